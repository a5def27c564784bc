"""Structured outputs: texts that keep to a schema, an expression, a grammar or a choice."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from jsonschema import Draft202012Validator
from models import backbone_of
from test_serving_engine import Blocked
from test_serving_methods import GENERATING, encoded, served  # noqa: F401
from test_serving_routes import Client, error_of
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine import grammars as grammars_module
from orchestrator.serving.engine.constraints import (
    Constraint,
    ConstraintFailed,
    GrammarConstraint,
    GrammarGuide,
)
from orchestrator.serving.engine.engine import Overloaded, ServingEngine
from orchestrator.serving.engine.generation import Completion, Sampling
from orchestrator.serving.engine.grammar_check import compile_grammar, translate
from orchestrator.serving.engine.grammars import BadRule, Grammars, OutputRule, TooComplex
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import ServedPrompt

pytest.importorskip("llguidance", reason="llguidance is not installed: make venv")

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["ham", "spam"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 1},
    },
    "required": ["label", "score", "tags"],
    "additionalProperties": False,
}
CHOICES = ["positive", "negative", 'neither "nor"', "neither", "é\n𝄞"]
EXPRESSION = r"[a-c]{2,5}-\d{2}"
LARK = 'start: item ("," item){0,3}\nitem: "yes" | /n+o/'
LLAMA_CPP = 'root ::= item ("," item)*\nitem ::= "on" | "off"'
EXPLODING = {"type": "integer", "multipleOf": 9999991}
# Each rule doubles the text of the next, and so does the work of each token.
DOUBLING = "\n".join(["start: a0", *(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)), 'a60: "x"'])


def fits_schema(text: str) -> bool:
    return Draft202012Validator(SCHEMA).is_valid(json.loads(text))


RULES: dict[str, tuple[OutputRule, Callable[[str], Any]]] = {
    "json": (OutputRule("json", json.dumps(SCHEMA)), fits_schema),
    "choice": (OutputRule("choice", json.dumps(CHOICES)), CHOICES.__contains__),
    "regex": (OutputRule("regex", EXPRESSION), re.compile(EXPRESSION).fullmatch),
    "lark": (OutputRule("grammar", LARK), re.compile(r"(yes|n+o)(,(yes|n+o)){0,3}").fullmatch),
    "llama.cpp": (OutputRule("grammar", LLAMA_CPP), re.compile(r"(on|off)(,(on|off))*").fullmatch),
    "labels": (OutputRule("labels", ""), {" ham", " spam"}.__contains__),
}
TEXTS = ["the quick brown fox", "is this a great movie, or a terrible one?"]
FREE = [Sampling(12, 0.0), Sampling(12, 1.0, seed=5), Sampling(12, 0.0, logprobs=2)]


@pytest.fixture
def client(service: PromptService) -> Client:
    return Client(service)


@pytest.fixture
def grammars(backbone: Backbone) -> Iterator[Grammars]:
    grammars = Grammars(backbone)
    yield grammars
    grammars.close()


def compiled(grammars: Grammars, rule: OutputRule, prompt: ServedPrompt) -> Constraint:
    return asyncio.run(grammars.constraint(rule, prompt))


def ask_together(
    backbone: Backbone, asked: list[tuple[ServedPrompt, list[list[int]], Sampling]]
) -> list[Any]:
    """Answer all requests in one batch; an error stands for its request's answer."""
    engine = Blocked(backbone)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(engine.complete(*one)) for one in asked]
        await asyncio.sleep(0)
        engine.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    engine.close()
    return answers


def shown(row: Completion) -> tuple[Any, ...]:
    """Return all of a row but the values of its log-probabilities, which batches round."""
    return row.text, row.finish_reason, row.tokens, [token.text for token in row.logprobs]


@pytest.mark.parametrize("name", RULES)
def test_every_text_keeps_to_its_rule_beside_free_rows(
    name: str, backbone: Backbone, spam: ServedPrompt, grammars: Grammars
) -> None:
    """Texts that ended satisfy the rule, at temperature 0 and 1, alone and in a batch.

    Rows without a constraint in that batch are what they are alone.
    """
    rule, fits = RULES[name]
    constraint = compiled(grammars, rule, spam)
    inputs = [spam.encode(text, 80) for text in TEXTS]
    bound = [
        Sampling(80, temperature, seed=seed, constraint=constraint)
        for temperature, seed in ((0.0, 0), (1.0, 1), (1.0, 2))
    ]
    asked = [(spam, inputs, sampling) for sampling in [*FREE, *bound]]
    together = ask_together(backbone, asked)
    offline = OfflineModel(backbone, spam)
    for answers, sampling in zip(together, [*FREE, *bound], strict=True):
        alone = offline.complete(TEXTS, sampling)
        assert [shown(row) for row in answers] == [shown(row) for row in alone]
    ended = [row for answers in together[3:] for row in answers if row.finish_reason == "stop"]
    assert len(ended) >= 4 and all(fits(row.text) for row in ended), ended


@pytest.mark.parametrize("family", GENERATING)
def test_all_families_and_methods_keep_to_a_choice(family: str, served: Any) -> None:  # noqa: F811
    """Rows of prompts of all methods choose a text, and answer with a label when asked to."""
    backbone, prompts = backbone_of(family), served(family)
    grammars = Grammars(backbone)
    some = next(iter(prompts.values()))
    choice = compiled(grammars, RULES["choice"][0], some)
    asked = []
    for prompt in prompts.values():
        labels = compiled(grammars, RULES["labels"][0], prompt)
        asked += [
            (prompt, encoded(prompt, 40), Sampling(40, 1.0, seed=1, constraint=constraint))
            for constraint in (choice, labels)
        ]
    answers = ask_together(backbone, asked)
    grammars.close()
    for chosen, labelled, prompt in zip(answers[::2], answers[1::2], prompts.values(), strict=True):
        assert {row.text for row in chosen} <= set(CHOICES)
        texts = prompt.encoder.verbalizer.texts
        assert {row.text.strip() for row in labelled} <= {text.strip() for text in texts}
        assert all(row.finish_reason == "stop" for row in [*chosen, *labelled])


def test_the_likeliest_label_is_that_of_classify(
    backbone: Backbone, spam: ServedPrompt, grammars: Grammars
) -> None:
    """With labels of one token, the greedy text is the label that /classify ranks first."""
    texts = [f"{text} {number}" for text in TEXTS for number in range(8)]
    constraint = compiled(grammars, RULES["labels"][0], spam)
    offline = OfflineModel(backbone, spam)
    rows = offline.complete(texts, Sampling(8, 0.0, constraint=constraint))
    assert {len(answer) for answer in spam.answers} == {1}
    assert spam.encoder.verbalizer is not None
    expected = [spam.encoder.verbalizer.texts[int(row["label"])] for row in offline.classify(texts)]
    assert [row.text for row in rows] == expected and len(set(expected)) == 2
    assert all(row.tokens == 1 for row in rows)  # nothing can follow, so no end token is made


def test_a_label_that_begins_another_may_end_or_go_on(
    backbone: Backbone, make_artifact: Any, grammars: Grammars
) -> None:
    """Of two labels of which one begins the other, both are given."""
    from orchestrator.serving.prompts.served_prompt import load_prompt

    folder = make_artifact("nested", verbalizer={0: " ab", 1: " ab abc"})
    prompt = load_prompt(backbone, folder, "nested", 1)
    constraint = compiled(grammars, OutputRule("labels", ""), prompt)
    sampling = [Sampling(20, 2.0, seed=seed, constraint=constraint) for seed in range(12)]
    rows = [OfflineModel(backbone, prompt).complete(["win"], one)[0] for one in sampling]
    assert {row.text for row in rows} == {" ab", " ab abc"}


def test_streams_and_stop_strings_work_as_before(
    backbone: Backbone, engine: ServingEngine, story: ServedPrompt, grammars: Grammars
) -> None:
    """Deltas add up to the completion; a stop string ends a text early."""
    constraint = compiled(grammars, OutputRule("regex", r'(\w{2,4} "\w{1,3}" ){3}'), story)
    inputs = [story.encode(text, 40) for text in TEXTS]
    sampling = Sampling(40, 1.0, seed=3, constraint=constraint)

    async def run() -> list[str]:
        texts = [""] * len(inputs)
        async for row, delta in engine.stream(story, inputs, sampling):
            texts[row] += delta.text
        return texts

    whole = OfflineModel(backbone, story).complete(TEXTS, sampling)
    assert asyncio.run(run()) == [row.text for row in whole]
    stopped = Sampling(40, 1.0, seed=3, stop=('"',), constraint=constraint)
    for row, early in zip(
        whole, OfflineModel(backbone, story).complete(TEXTS, stopped), strict=True
    ):
        assert early.text == row.text.split('"')[0] and early.finish_reason == "stop"


def test_max_tokens_cuts_a_text(
    backbone: Backbone, story: ServedPrompt, grammars: Grammars
) -> None:
    """A text that is not complete at max_tokens ends there, and says so."""
    constraint = compiled(grammars, OutputRule("regex", "[a-c]{30}"), story)
    (row,) = OfflineModel(backbone, story).complete(["a"], Sampling(6, 0.0, constraint=constraint))
    assert row.finish_reason == "length" and re.fullmatch("[a-c]{6,12}", row.text)
    (row,) = OfflineModel(backbone, story).complete(["a"], Sampling(60, 0.0, constraint=constraint))
    assert row.finish_reason == "stop" and re.fullmatch("[a-c]{30}", row.text)


def test_logprobs_stay_those_of_the_model(
    backbone: Backbone, story: ServedPrompt, grammars: Grammars
) -> None:
    """The log-probability of a token is the model's, whatever the constraint rules out."""
    constraint = compiled(grammars, OutputRule("regex", "[xyz]{3}"), story)
    sampling = Sampling(5, 0.0, logprobs=2, constraint=constraint)
    (row,) = OfflineModel(backbone, story).complete(TEXTS[:1], sampling)
    state: Any = backbone.start(story.prepared, [story.encode(TEXTS[0], 5)], [0])
    scores = state.logits[0].log_softmax(-1)
    first = row.logprobs[0]
    (token,) = backbone.tokenizer(first.text, add_special_tokens=False)["input_ids"]
    assert first.logprob == pytest.approx(float(scores[token]), abs=1e-5)
    assert first.top[0][1] == pytest.approx(float(scores.max()), abs=1e-5)
    assert first.top[0][0] != first.text


def test_a_row_that_can_not_go_on_fails_alone(
    backbone: Backbone, story: ServedPrompt, grammars: Grammars, caplog: Any
) -> None:
    """A grammar whose next token would take too much work fails its request and no other."""
    constraint = compiled(grammars, OutputRule("grammar", DOUBLING), story)
    ids = [story.encode("a", 9)]
    free = Sampling(9, 0.0)
    failed, answered = ask_together(
        backbone, [(story, ids, Sampling(9, 0.0, constraint=constraint)), (story, ids, free)]
    )
    assert isinstance(failed, ConstraintFailed) and "too complex" in failed.message
    assert answered == OfflineModel(backbone, story).complete(["a"], free)
    assert "failed" not in caplog.text  # a client's mistake is no fault of the server
    with pytest.raises(ConstraintFailed):
        OfflineModel(backbone, story).complete(["a"], Sampling(9, 0.0, constraint=constraint))


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's: pieces with a mark for spaces, and no bytes."""
    pieces = ["<end>", "<unk>", "▁", "a", "b", "▁a", "c", "ab", "▁b", "bc", "d", "▁ab"]
    scores = [(piece, -1.0 - place / 50) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(tokenizer_models.Unigram(scores, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def test_tokenizers_that_begin_a_text_with_a_space() -> None:
    """Where decoding drops a text's first space, texts may begin with it, and are the choices.

    llguidance itself can't read such a tokenizer.
    """
    tokenizer, choose = pieces_tokenizer(), random.Random(0)
    vocabulary = grammars_module._read_vocabulary(tokenizer, 0)  # type: ignore[arg-type]
    assert grammars_module._drops_leading_space(tokenizer, vocabulary)  # type: ignore[arg-type]
    choices = ["abcd abcd a", "bca", "ab"]
    grammar = translate("choice", json.dumps(choices), leading_space=True)
    constraint = GrammarConstraint(compile_grammar(vocabulary, grammar))
    texts, spaced = set(), 0
    for _ in range(40):
        guide, ids = constraint.start(), []
        while True:
            token = choose.choice(guide.allowed(12).nonzero()[:, 0].tolist())
            ids.append(token)
            if token == 0 or guide.take(token):
                break
        texts.add(tokenizer.decode(ids, skip_special_tokens=True))
        spaced += ids[0] in (2, 5, 8, 11)
    assert texts == set(choices) and 0 < spaced < 40


def test_characters_that_the_vocabulary_lacks_are_refused() -> None:
    """A text that the tokens can't write fails instead of ending early."""
    vocabulary = grammars_module._read_vocabulary(pieces_tokenizer(), 0)  # type: ignore[arg-type]
    matcher = compile_grammar(vocabulary, translate("choice", '["xyz"]'))
    with pytest.raises(ConstraintFailed, match="no token of the base model"):
        GrammarGuide(matcher).allowed(12)


def test_a_mask_has_the_size_of_the_logits(
    backbone: Backbone, story: ServedPrompt, grammars: Grammars
) -> None:
    """Rows of the model's head beyond the tokenizer's tokens are never allowed."""
    constraint = compiled(grammars, OutputRule("regex", "a|b"), story)
    size = len(backbone.tokenizer)
    mask = constraint.start().allowed(size + 70)
    assert mask.shape == (size + 70,) and mask.sum() == 2 and not mask[size:].any()
    assert torch.equal(constraint.start().allowed(size), mask[:size])


def test_grammars_are_compiled_once_and_kept_within_a_bound(
    backbone: Backbone, story: ServedPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests at the same time and later ones share a grammar; old ones are dropped."""
    monkeypatch.setattr(grammars_module, "MAX_COMPILED", 2)
    grammars = Grammars(backbone)
    rules = [OutputRule("regex", letter) for letter in "abc"]

    async def run() -> None:
        first, again = await asyncio.gather(
            *(grammars.constraint(rules[0], story) for _ in range(2))
        )
        assert first is again is await grammars.constraint(rules[0], story)
        for rule in rules:
            await grammars.constraint(rule, story)
        assert [rule for rule, _ in grammars._compiled] == rules[1:]
        assert await grammars.constraint(rules[0], story) is not first

    asyncio.run(run())
    grammars.close()


def test_a_request_that_hangs_up_does_not_take_the_grammar_from_others(
    story: ServedPrompt, grammars: Grammars
) -> None:
    """Two requests wait for one grammar; one leaves, and the other gets it."""
    rule = OutputRule("regex", "a{2}")

    async def run() -> None:
        # While all threads are busy, the rule waits, and could be taken back.
        others = [
            OutputRule("regex", "b" * count) for count in range(1, grammars_module.THREADS + 1)
        ]
        busy = [asyncio.create_task(grammars.constraint(other, story)) for other in others]
        await asyncio.sleep(0)
        gone = asyncio.create_task(grammars.constraint(rule, story))
        stays = asyncio.create_task(grammars.constraint(rule, story))
        await asyncio.sleep(0)
        gone.cancel()
        assert isinstance(await stays, GrammarConstraint)
        await asyncio.gather(*busy)

    asyncio.run(run())


def test_too_many_waiting_grammars_are_refused(
    backbone: Backbone, story: ServedPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound of waiting grammars a request is told to come back."""
    monkeypatch.setattr(grammars_module, "MAX_COMPILING", 1)
    grammars = Grammars(backbone)

    async def run() -> None:
        first = asyncio.create_task(grammars.constraint(OutputRule("regex", "a"), story))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await grammars.constraint(OutputRule("regex", "b"), story)
        await first

    asyncio.run(run())
    grammars.close()


def test_an_exploding_grammar_is_killed_and_harms_nobody(
    backbone: Backbone, engine: ServingEngine, story: ServedPrompt
) -> None:
    """A schema without end to its compilation is refused, while texts are generated as ever.

    Its process is gone afterwards. It may be asked for again, since a busy machine may be why.
    """
    grammars = Grammars(backbone, cpu_seconds=1)
    rule = OutputRule("json", json.dumps(EXPLODING))
    answered = 0
    before = threading.active_count()

    async def run() -> None:
        nonlocal answered
        exploding = asyncio.create_task(grammars.constraint(rule, story))
        while not exploding.done():
            await engine.complete(story, [story.encode("a", 4)], Sampling(4, 0.0))
            await asyncio.sleep(0.01)
            answered += 1
        with pytest.raises(TooComplex, match="more time or memory"):
            await exploding

    asyncio.run(run())
    grammars.close()
    assert answered > 10 and not grammars._compiled
    assert threading.active_count() <= before + grammars_module.THREADS
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not any("grammar_check.py" in command for command in commands)


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(text, dict)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "mail", "strict": True, "schema": SCHEMA},
                }
            },
            Draft202012Validator(SCHEMA).is_valid,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Draft202012Validator(SCHEMA).is_valid),
        ({"guided_json": json.dumps(SCHEMA)}, Draft202012Validator(SCHEMA).is_valid),
        ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(text, dict)),
        ({"structured_outputs": {"choice": ["true", "false"]}}, lambda text: text in (True, False)),
        ({"guided_choice": ["10", "20"]}, lambda text: text in (10, 20)),
        ({"structured_outputs": {"regex": "[1-9]{3}"}}, lambda text: 111 <= text <= 999),
        ({"guided_regex": "[1-9]{3}"}, lambda text: 111 <= text <= 999),
        ({"structured_outputs": {"grammar": 'start: "[" "7"+ "]"'}}, lambda text: len(text) == 1),
        ({"guided_grammar": 'root ::= "[" "7"+ "]"'}, lambda text: len(text) == 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_requests_for_structure(
    client: Client, fields: dict[str, Any], fits: Callable[[Any], bool]
) -> None:
    """OpenAI's fields and both generations of vLLM's work on both routes."""
    body = {"model": "story", "max_tokens": 120, "seed": 4, "temperature": 0.7, **fields}
    plain = client.post("/v1/completions", {**body, "prompt": "a"})
    messages = [{"role": "user", "content": "a"}]
    chat = client.post("/v1/chat/completions", {**body, "messages": messages})
    assert plain.status_code == chat.status_code == 200, plain.text + chat.text
    (choice,), (message,) = plain.json()["choices"], chat.json()["choices"]
    assert choice["finish_reason"] == "stop" and fits(json.loads(choice["text"])), choice
    assert message["message"]["content"] == choice["text"]


def test_labels_are_a_choice_of_their_own(client: Client) -> None:
    """A prompt with a verbalizer answers with one of its texts; one without is named."""
    body = {"model": "spam", "messages": [{"role": "user", "content": "win"}]}
    for fields in ({"structured_outputs": {"choice": "labels"}}, {"guided_choice": "labels"}):
        answer = client.post("/v1/chat/completions", {**body, **fields})
        assert answer.json()["choices"][0]["message"]["content"] in (" ham", " spam")
    refused = client.post(
        "/v1/chat/completions", {**body, "model": "story", "guided_choice": "labels"}
    )
    error = error_of(refused)
    assert (refused.status_code, error["param"]) == (400, "guided_choice")
    assert "has no labels" in error["message"]


def test_formats_that_change_nothing_are_accepted(client: Client) -> None:
    """The format ``text`` and null fields give the text of a request without them."""
    body = {"model": "story", "prompt": "a", "temperature": 0}
    plain = client.post("/v1/completions", body).json()["choices"]
    nothing = {"response_format": {"type": "text"}, "structured_outputs": None, "guided_json": None}
    assert client.post("/v1/completions", {**body, **nothing}).json()["choices"] == plain


def schema(**keys: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": keys}}}


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    (schema(type="nope"), "bad_constraint", "response_format", "Invalid type: nope"),
    (schema(**{"$ref": "http://x/y"}), "bad_constraint", "response_format", "http://x/y"),
    (schema(**{"not": {}}), "bad_constraint", "response_format", '["not"]'),
    (schema(type="integer", minimum=2, maximum=1), "bad_constraint", "response_format", "minimum"),
    ({"guided_regex": "a("}, "bad_constraint", "guided_regex", "unclosed group"),
    ({"guided_regex": r"(a)\1"}, "bad_constraint", "guided_regex", "backreferences"),
    ({"guided_grammar": "start: start"}, "bad_constraint", "guided_grammar", "no text"),
    ({"guided_grammar": "start: b"}, "bad_constraint", "guided_grammar", "unknown name"),
    ({"guided_grammar": "nonsense"}, "bad_constraint", "guided_grammar", "::="),
    (
        {"structured_outputs": {"choice": ["a"] * 10_000}},
        "invalid_value",
        "structured_outputs",
        "at most 1000 items",
    ),
    ({"guided_choice": []}, "invalid_value", "guided_choice", "at least 1 item"),
    ({"guided_choice": [""]}, "invalid_value", "guided_choice", "at least 1 character"),
    ({"guided_choice": "lables"}, "invalid_value", "guided_choice", "'labels'"),
    ({"guided_json": "{"}, "unsupported_parameter", "guided_json", "not valid JSON"),
    ({"guided_json": "[1]"}, "unsupported_parameter", "guided_json", "not a JSON object"),
    (
        {"structured_outputs": {}},
        "unsupported_parameter",
        "structured_outputs",
        "exactly one of choice",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "unsupported_parameter",
        "structured_outputs",
        "exactly one of choice",
    ),
    (
        {"structured_outputs": {"structural_tag": "x", "regex": "a"}},
        "unsupported_parameter",
        "structured_outputs.structural_tag",
        "allowed: choice, grammar, json, json_object, regex",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "unsupported_parameter",
        "guided_regex",
        "can't be combined with 'response_format'",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "unsupported_parameter",
        "response_format.json_schema",
        "is required",
    ),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format", "'json_schema'"),
    ({"guided_decoding_backend": "x"}, "unsupported_parameter", "guided_decoding_backend", ""),
    ({"guided_json": {"enum": ["x" * 70_000]}}, "unsupported_parameter", "guided_json", "65536"),
]


def test_what_can_not_be_followed_is_refused(service: PromptService) -> None:
    """Each refusal is a 400 that names the field and the reason."""
    service.limits = type(service.limits)(max_inputs=8)
    client = Client(service)
    for fields, code, param, reason in BAD:
        answer = client.post("/v1/completions", {"model": "story", "prompt": "a", **fields})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
        assert reason in error["message"], error


def test_numbers_that_json_can_not_write_are_refused(client: Client) -> None:
    """An infinite number in a schema is named instead of compiled."""
    body = '{"model": "story", "prompt": "a", "guided_json": {"const": 1e999}}'
    error = error_of(client.post("/v1/completions", body))
    assert error["param"] == "guided_json" and "number" in error["message"]


def test_a_row_that_can_not_go_on_is_a_bad_request(client: Client) -> None:
    """A constraint that fails while a text is written gives a 400, in a stream its event."""
    body = {"model": "story", "prompt": "a", "guided_grammar": DOUBLING}
    answer = client.post("/v1/completions", body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "constraint_failed")
    stream = client.post("/v1/completions", {**body, "stream": True})
    last = stream.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "constraint_failed"


def test_a_server_without_the_library_says_so(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without llguidance a request is refused with the remedy; a choice of labels works."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    body = {"model": "spam", "prompt": "a"}
    answer = client.post("/v1/completions", {**body, "guided_regex": "a"})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "guided_regex")
    assert "prompt-orchestrator[structured]" in error["message"]
    answer = client.post("/v1/completions", {**body, "guided_choice": "labels"})
    assert answer.json()["choices"][0]["text"] in (" ham", " spam")


def test_a_new_grammar_compiles_quickly(story: ServedPrompt, grammars: Grammars) -> None:
    """A schema of usual size compiles; one that was compiled costs nothing."""
    rule = RULES["json"][0]
    compiled(grammars, rule, story)
    start = time.process_time()
    for _ in range(100):
        compiled(grammars, rule, story)
    assert time.process_time() - start < 1


def test_bad_rules_are_remembered(
    story: ServedPrompt, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that does not compile is refused again without another process, as a new error."""
    rule = OutputRule("regex", "a(")
    with pytest.raises(BadRule, match="unclosed group") as first:
        compiled(grammars, rule, story)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(BadRule, match="unclosed group") as again:
        compiled(grammars, rule, story)
    assert first.value is not again.value
