"""The settings that choose a row's tokens, held against definitions written out in full."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import backbone_of
from test_serving_methods import encoded, served  # noqa: F401
from transformers import MinPLogitsWarper, TopKLogitsWarper

from orchestrator.artifact import PromptArtifact
from orchestrator.models.backbone import Backbone, CausalBackbone
from orchestrator.models.placeholders import placed, text_ids
from orchestrator.models.scoring import answer_scores
from orchestrator.serving.engine import input_scores
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.engine.generation import (
    Completion,
    GenerationBatch,
    GenerationRow,
    Sampling,
)
from orchestrator.serving.engine.input_scores import score_inputs
from orchestrator.serving.engine.logit_rules import LogitRules, truncated
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt

TEXTS = ["the quick brown fox", "win", "is this a great movie, or a terrible one?"]
GREEDY = Sampling(max_tokens=12, temperature=0.0)
Rule = Callable[[list[float], list[int], list[int]], list[float]]


def ask(
    engine: ServingEngine,
    prompt: ServedPrompt,
    inputs: Sequence[list[int]],
    sampling: Sampling | Sequence[Sampling],
) -> list[Completion]:
    return asyncio.run(engine.complete(prompt, inputs, sampling))


def greedy_ids(
    backbone: Backbone, prompt: ServedPrompt, ids: list[int], rule: Rule, tokens: int
) -> list[int]:
    """Generate token by token, running the whole row at each step, with a rule on the logits."""
    made: list[int] = []
    while len(made) < tokens and made[-1:] != [prompt.encoder.end_id]:
        state: Any = backbone.start(prompt.prepared, [[*ids, *made]], [0])
        logits = rule(state.logits[0].tolist(), ids, made)
        made.append(max(range(len(logits)), key=logits.__getitem__))
    return made


def repetition(logits: list[float], ids: list[int], made: list[int]) -> list[float]:
    seen = {*ids, *made}
    return [
        (value / 1.7 if value > 0 else value * 1.7) if token in seen else value
        for token, value in enumerate(logits)
    ]


def frequency_and_presence(logits: list[float], ids: list[int], made: list[int]) -> list[float]:
    counts = Counter(made)
    return [
        value - 1.5 * counts[token] - 2.0 * (token in counts) for token, value in enumerate(logits)
    ]


def biases(logits: list[float], ids: list[int], made: list[int]) -> list[float]:
    return [value + {5: 3.0, 40: -7.0}.get(token, 0.0) for token, value in enumerate(logits)]


@pytest.mark.parametrize(
    ("rules", "rule"),
    [
        (LogitRules(repetition_penalty=1.7), repetition),
        (LogitRules(presence_penalty=2.0, frequency_penalty=1.5), frequency_and_presence),
        (LogitRules(bias=((5, 3.0), (40, -7.0))), biases),
    ],
)
def test_penalties_and_biases_are_those_of_their_definition(
    backbone: Backbone, engine: ServingEngine, story: ServedPrompt, rules: LogitRules, rule: Rule
) -> None:
    """Greedy rows with a rule are those of a loop that applies the rule to each logit.

    Rows without it in the same batch are generated as they are alone.
    """
    inputs = [story.encode(text, 12) for text in TEXTS]
    ruled = Sampling(max_tokens=12, temperature=0.0, rules=rules)
    mixed = ask(engine, story, [*inputs, *inputs], [ruled] * 3 + [GREEDY] * 3)
    plain = ask(engine, story, inputs, GREEDY)
    decode = backbone.tokenizer.decode
    for ids, completion in zip(inputs, mixed, strict=False):
        expected = greedy_ids(backbone, story, ids, rule, 12)
        assert completion.tokens == len(expected)
        assert completion.text == decode(expected, skip_special_tokens=True)
    assert mixed[3:] == plain
    assert [one.text for one in mixed[:3]] != [one.text for one in plain]


def test_the_defaults_leave_greedy_rows_to_the_model() -> None:
    """A row without settings needs only the likeliest token, so no logits are copied for it."""
    assert GREEDY.plain and LogitRules().changes_nothing
    for setting in (
        {"rules": LogitRules(presence_penalty=0.1)},
        {"min_tokens": 1},
        {"temperature": 1.0},
        {"logprobs": 0},
    ):
        assert not Sampling(**{"temperature": 0.0, **setting}).plain  # type: ignore[arg-type]


@pytest.mark.parametrize(("top_k", "min_p"), [(7, 0.0), (0, 0.05), (20, 0.02), (0, 1.0), (1, 0.0)])
def test_top_k_and_min_p_keep_what_transformers_keeps(top_k: int, min_p: float) -> None:
    """The probabilities are those of transformers' warpers, on random logits."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 200, generator=generator) * 3
    ids = torch.zeros(1, 1, dtype=torch.long)
    warped = MinPLogitsWarper(min_p)(ids, logits) if min_p else logits  # type: ignore[arg-type]
    if top_k:
        warped = TopKLogitsWarper(top_k)(ids, warped)  # type: ignore[arg-type,assignment]
    probs, order = logits[0].softmax(-1).sort(descending=True)
    expected = warped[0].softmax(-1)[order]
    assert torch.allclose(truncated(probs, top_k, min_p), expected, atol=1e-6)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"min_p": 1.0}])
def test_the_narrowest_settings_draw_the_likeliest_token(
    engine: ServingEngine, story: ServedPrompt, setting: dict[str, Any]
) -> None:
    """One token to draw from is greedy decoding, at any temperature."""
    inputs = [story.encode(text, 12) for text in TEXTS]
    drawn = ask(engine, story, inputs, Sampling(max_tokens=12, temperature=1.9, seed=1, **setting))
    assert drawn == ask(engine, story, inputs, GREEDY)


def ending(story: ServedPrompt, **settings: Any) -> Sampling:
    """Return a greedy rule whose likeliest token is the end token."""
    assert story.encoder.end_id is not None
    rules = LogitRules(bias=((story.encoder.end_id, 100.0),))
    return Sampling(max_tokens=9, temperature=0.0, rules=rules, **settings)


def test_min_tokens_holds_the_end_back_and_ignore_eos_passes_it(
    engine: ServingEngine, story: ServedPrompt
) -> None:
    """The end token comes right after min_tokens; a row that ignores it runs to its limit."""
    ids = [story.encode("the quick", 12)]
    (at_once,) = ask(engine, story, ids, ending(story))
    (later,) = ask(engine, story, ids, ending(story, min_tokens=5))
    (never,) = ask(engine, story, ids, ending(story, ignore_eos=True))
    assert (at_once.tokens, at_once.finish_reason) == (1, "stop")
    assert (later.tokens, later.finish_reason) == (6, "stop") and later.text
    assert (never.tokens, never.finish_reason, never.text) == (9, "length", "")


def test_stop_tokens_end_a_row_without_their_text(
    engine: ServingEngine, story: ServedPrompt, backbone: Backbone
) -> None:
    """The row ends at the token, or with min_tokens can't choose it before."""
    ids = story.encode("the quick", 12)
    made = greedy_ids(backbone, story, ids, lambda logits, *_: logits, 12)
    stop = made[3]
    first = made.index(stop)
    sampling = Sampling(max_tokens=12, temperature=0.0, stop_token_ids=frozenset({stop}))
    (ended,) = ask(engine, story, [ids], sampling)
    assert (ended.tokens, ended.finish_reason) == (first + 1, "stop")
    assert ended.text == backbone.tokenizer.decode(made[:first])

    def without_stop(logits: list[float], _: list[int], so_far: list[int]) -> list[float]:
        barred = {stop, story.encoder.end_id} if len(so_far) < 12 else set()
        return [-1e9 if token in barred else value for token, value in enumerate(logits)]

    held = Sampling(12, 0.0, stop_token_ids=frozenset({stop}), min_tokens=12)
    (whole,) = ask(engine, story, [ids], held)
    expected = greedy_ids(backbone, story, ids, without_stop, 12)
    assert whole.text == backbone.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_stop_string_within_min_tokens_is_text(
    engine: ServingEngine, story: ServedPrompt
) -> None:
    """Stop strings that end before min_tokens do not end the row; the next one does."""
    ids = [story.encode("the quick", 12)]
    forced = LogitRules(bias=((story.encoder.tokenizer("a")["input_ids"][0], 100.0),))
    sampling = Sampling(max_tokens=12, temperature=0.0, rules=forced, stop=("aa",))
    (early,) = ask(engine, story, ids, sampling)
    assert (early.text, early.tokens) == ("", 2)
    held = Sampling(max_tokens=12, temperature=0.0, rules=forced, stop=("aa",), min_tokens=6)
    (late,) = ask(engine, story, ids, held)
    assert (late.text, late.tokens, late.finish_reason) == ("aaaaa", 7, "stop")


def test_rows_of_one_input_run_it_once(
    backbone: Backbone,
    engine: ServingEngine,
    story: ServedPrompt,
    spam: ServedPrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several answers to an input share its forward, and are those of separate requests."""
    started: list[int] = []
    start = backbone.start

    def noting(prompts: Any, inputs: Any, prompt: Any) -> Any:
        started.append(len(inputs))
        return start(prompts, inputs, prompt)

    monkeypatch.setattr(backbone, "start", noting)
    ids = story.encode("the quick", 12)
    drawn = [Sampling(max_tokens=12, seed=seed) for seed in range(4)]
    together = ask(engine, story, [ids] * 4, drawn)
    assert started == [1]
    alone = [ask(engine, story, [list(ids)], sampling)[0] for sampling in drawn]
    assert together == alone and len({one.text for one in alone}) > 1
    # The same list behind two prompts is two inputs.
    batch = GenerationBatch(
        backbone,
        [row_of(prompt, ids) for prompt in (story, spam, story)],
    )
    assert started[-1] == 2
    assert batch._state.logits.shape[0] == 3
    assert not torch.allclose(batch._state.logits[0], batch._state.logits[1])
    assert torch.equal(batch._state.logits[0], batch._state.logits[2])


def row_of(prompt: ServedPrompt, ids: list[int]) -> GenerationRow:
    return GenerationRow(prompt, ids, GREEDY)


def reference_scores(
    backbone: Backbone, weights: torch.Tensor, row: Sequence[int], inside: bool
) -> list[float]:
    """Return the log-probability of each text token but the first, by one unpadded forward.

    ``row`` is placed: -(k + 1) is virtual token k.
    """
    table = backbone.table
    embeds = [weights[-entry - 1] if entry < 0 else table[entry] for entry in row]
    if not inside:
        embeds = [*weights, *embeds]
    with torch.inference_mode():
        logits = backbone.model(inputs_embeds=torch.stack(embeds)[None].to(table)).logits[0]
    scores = logits.log_softmax(-1)
    before = len(embeds) - len(row)
    places = [place for place, entry in enumerate(row) if entry >= 0][1:]
    return [float(scores[before + place - 1, row[place]]) for place in places]


@pytest.mark.parametrize("prompt_once", [True, False])
@pytest.mark.parametrize("template", ["{text}", "a {*} movie: {text} {*}"])
@pytest.mark.parametrize("columns", [1 << 20, 7])
def test_an_input_s_scores_are_the_model_s(
    backbone: Backbone,
    make_artifact: Any,
    monkeypatch: pytest.MonkeyPatch,
    prompt_once: bool,
    template: str,
    columns: int,
) -> None:
    """Each token's log-probability is that of a forward over the unpadded row.

    That holds for virtual tokens in front and inside, rows of different lengths, and rows that
    are computed in parts.
    """
    monkeypatch.setattr(input_scores, "MAX_LOGITS", columns * len(backbone.table))
    backbone = CausalBackbone(backbone.model, backbone.tokenizer, backbone.info, prompt_once)
    folders = [make_artifact(f"p{size}", tokens=size, template=template) for size in (3, 6)]
    prompts = [load_prompt(backbone, folder, folder.name, 1) for folder in folders]
    weights = [torch.from_numpy(PromptArtifact.load(folder).weights) for folder in folders]
    given = [(index % 2, prompts[index % 2].encode(text, 1)) for index, text in enumerate(TEXTS)]
    scored = score_inputs(
        backbone, [prompts[index] for index, _ in given], [ids for _, ids in given], [0, 3, 2]
    )
    inside = "{*}" in template
    for (index, ids), tokens, count in zip(given, scored, [0, 3, 2], strict=True):
        row = placed(ids, len(weights[index]) if inside else 0)
        expected = reference_scores(backbone, weights[index], row, inside)
        assert [entry.token for entry in tokens] == text_ids(ids)
        assert tokens[0].logprob is None and tokens[0].rank is None
        values = [entry.logprob for entry in tokens[1:]]
        assert values == pytest.approx(expected, abs=1e-4)
        for entry in tokens[1:]:
            assert len(entry.likeliest) == count and entry.rank is not None
            for rank, (token, value) in enumerate(entry.likeliest, start=1):
                assert (token == entry.token) == (rank == entry.rank)
                assert entry.logprob is not None
                assert (value >= entry.logprob) == (rank <= entry.rank)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "bloom"])
def test_an_input_s_scores_are_those_of_ranking(family: str, served: Any) -> None:  # noqa: F811
    """An answer behind an input scores what /classify compares, with every prompt method."""
    backbone = backbone_of(family)
    for prompt in served(family).values():
        (ids,) = encoded(prompt)[:1]
        rows = [[*ids, *answer] for answer in prompt.answers]
        scored = score_inputs(backbone, [prompt] * len(rows), rows, [0] * len(rows))
        sums = [
            sum(entry.logprob or 0.0 for entry in tokens[-len(answer) :])
            for tokens, answer in zip(scored, prompt.answers, strict=True)
        ]
        with torch.inference_mode():
            (expected,) = answer_scores(backbone, prompt.prepared, [ids], [0], [prompt.answers])
        assert sums == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("family", ["mistral", "bloom", "t5", "bart"])
def test_several_answers_share_an_input_in_every_family(
    family: str,
    served: Any,  # noqa: F811
) -> None:
    """The answers are those of separate requests, also where rows are run again at each step."""
    backbone = backbone_of(family)
    prompt = next(iter(served(family).values()))
    engine = ServingEngine(backbone)
    ids = encoded(prompt)[0]
    drawn = [Sampling(max_tokens=6, seed=seed) for seed in range(3)]
    together = ask(engine, prompt, [ids] * 3, drawn)
    alone = [ask(engine, prompt, [list(ids)], sampling)[0] for sampling in drawn]
    engine.close()
    assert together == alone


def test_a_model_that_reads_both_ways_has_no_scores(served: Any) -> None:  # noqa: F811
    """An encoder does not predict its input; the engine goes on after such a request."""
    prompt = next(iter(served("t5").values()))
    engine = ServingEngine(backbone_of("t5"))
    ids = encoded(prompt)[:1]
    with pytest.raises(ValueError, match="a seq2seq model gives its input no log-probabilities"):
        ask(engine, prompt, ids, Sampling(max_tokens=2, prompt_logprobs=0))
    assert len(ask(engine, prompt, ids, GREEDY)) == 1
    engine.close()
