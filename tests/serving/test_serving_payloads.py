"""Requests that common clients send, as they send them, and what they read from the answers."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from models import backbone_of
from test_serving_api import chat_template  # noqa: F401
from test_serving_routes import Client, error_of
from test_serving_sampling import greedy_ids

from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.access import Access, add_key, load_keys
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.prompts.store import PromptStore

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FOX: dict[str, Any] = {"model": "story", "prompt": "the fox", "max_tokens": 8, "temperature": 0}
TALK: dict[str, Any] = {
    "model": "story",
    "messages": [{"role": "user", "content": "the fox"}],
    "max_tokens": 8,
    "temperature": 0,
}


@pytest.fixture
def client(service: PromptService) -> Client:
    return Client(service)


def answer_of(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts_of(document: Any) -> list[str]:
    return [choice.get("text") or choice["message"]["content"] for choice in document["choices"]]


def chunks_of(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    *events, done = [line for line in answer.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def ids_of(backbone: Backbone, text: str) -> list[int]:
    return list(backbone.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- vllm bench serve ------------------------------------------------------------------------------


def test_vllm_bench_serve_gets_all_the_tokens_that_it_asks_for(client: Client) -> None:
    """Its payload streams, and with ignore_eos has exactly as many tokens as asked."""
    body = {
        "model": "story",
        "prompt": "the fox",
        "repetition_penalty": 1.0,
        "max_tokens": 40,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    chunks = chunks_of(client.post(COMPLETIONS, body))
    assert chunks[-1]["usage"]["completion_tokens"] == 40
    assert [one["finish_reason"] for chunk in chunks[-2:] for one in chunk["choices"]] == ["length"]
    talk = {
        "model": "story",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}],
        "max_completion_tokens": 40,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    told = chunks_of(client.post(CHAT, talk))
    assert told[-1]["usage"] == chunks[-1]["usage"]
    text = "".join(one["text"] for chunk in chunks for one in chunk["choices"])
    said = (one["delta"]["content"] or "" for chunk in told for one in chunk["choices"])
    assert "".join(said) == text


# -- lm-evaluation-harness -------------------------------------------------------------------------


def harness_likelihoods(document: Any, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Read log-likelihoods as lm-evaluation-harness does for local-completions."""
    results = []
    for choice, start in zip(document["choices"], context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][start:-1]
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        results.append((sum(values), is_greedy))
    return results


def test_lm_eval_s_log_likelihoods_are_our_own_scores(client: Client, service: Any) -> None:
    """Echoed log-likelihoods of labels behind an input have the ratio of /classify's answer."""
    backbone = service.engine.backbone
    prompt = service.store.get("trec")
    row = {"question": "who is the fox", "topic": "a person"}
    context = prompt.encode(row, 0)
    labels = prompt.encoder.answers
    body = {
        "model": "trec",
        "prompt": [[*context, *ids] for ids in labels],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    document = answer_of(client.post(COMPLETIONS, body))
    results = harness_likelihoods(document, [len(context)] * len(labels))
    weights = [math.exp(value) for value, _ in results]
    probs = answer_of(client.post("/classify", {"model": "trec", "input": row}))["data"][0]["probs"]
    expected = [value / sum(weights) for value in weights]
    assert list(probs.values()) == pytest.approx(expected, abs=1e-5)
    for ids, choice in zip(labels, document["choices"], strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert len(told["tokens"]) == len(context) + len(ids) + 1
        whole = backbone.tokenizer.decode([*context, *ids])
        assert choice["text"].startswith(whole) and "".join(told["tokens"]) == choice["text"]
        offsets = [sum(map(len, told["tokens"][:place])) for place in range(len(told["tokens"]))]
        assert told["text_offset"] == offsets
    assert document["usage"]["prompt_tokens"] == sum(map(len, body["prompt"]))


def test_lm_eval_knows_a_greedy_continuation(
    client: Client, backbone: Backbone, service: Any
) -> None:
    """What greedy decoding generates is greedy to lm-eval, and anything else is not.

    The greedy continuation is also asked for as older harnesses do: with no tokens to generate.
    """
    context = ids_of(backbone, "the fox")
    prompt = service.store.get("story")
    greedy = [*context, *greedy_ids(backbone, prompt, context, lambda logits, *_: logits, 4)]
    asked = {"model": "story", "temperature": 0, "logprobs": 1, "echo": True}
    made = answer_of(client.post(COMPLETIONS, {**asked, "prompt": context, "max_tokens": 4}))
    other = [*greedy[:-1], (greedy[-1] + 1) % 300]
    body = {**asked, "prompt": [greedy, other], "max_tokens": 1}
    document = answer_of(client.post(COMPLETIONS, body))
    likelihoods = harness_likelihoods(document, [len(context)] * 2)
    assert [is_greedy for _, is_greedy in likelihoods] == [True, False]
    values = made["choices"][0]["logprobs"]["token_logprobs"][len(context) :]
    assert likelihoods[0][0] == pytest.approx(sum(values), abs=1e-4)
    older = {**asked, "prompt": greedy, "max_tokens": 0}
    (alone,) = answer_of(client.post(COMPLETIONS, older))["choices"]
    assert alone["text"] == backbone.tokenizer.decode(greedy)
    assert alone["finish_reason"] == "length"
    assert sum(alone["logprobs"]["token_logprobs"][len(context) :]) == pytest.approx(
        likelihoods[0][0], abs=1e-4
    )


def test_lm_eval_in_a_chat(client: Client) -> None:
    """Messages with a type of their own, and settings that change nothing, are taken."""
    message = {"role": "user", "content": "the fox", "type": "text"}
    body = {**TALK, "messages": [message], "stop": ["\0"], "seed": 1234}
    assert texts_of(answer_of(client.post(CHAT, body))) == texts_of(
        answer_of(client.post(CHAT, TALK))
    )


def test_lm_eval_s_remote_tokenizer(client: Client, backbone: Backbone) -> None:
    """Its three routes give ids that can be joined, sent and decoded; it names no model."""
    info = answer_of(client.get("/tokenizer_info"))
    assert info["eos_token"] == "<end>" and info["bos_token"] is None

    def encode(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return list(answer_of(client.post("/tokenize", body))["tokens"])

    assert encode("<end>") == [backbone.tokenizer.eos_token_id]
    ids = [*encode("the quick"), *encode(" fox")]
    assert answer_of(client.post("/detokenize", {"tokens": ids})) == {"prompt": "the quick fox"}
    assert answer_of(client.post(COMPLETIONS, {**FOX, "prompt": ids}))["usage"][
        "prompt_tokens"
    ] == len(ids)


# -- Token ids and echo ----------------------------------------------------------------------------


def test_token_ids_are_the_input_itself(client: Client, backbone: Backbone) -> None:
    """The ids of a text behind a bare template answer as the text does, alone or in a list."""
    ids = ids_of(backbone, "the fox")
    expected = texts_of(answer_of(client.post(COMPLETIONS, FOX)))
    assert texts_of(answer_of(client.post(COMPLETIONS, {**FOX, "prompt": ids}))) == expected
    several = answer_of(client.post(COMPLETIONS, {**FOX, "prompt": [ids, ids]}))
    assert texts_of(several) == expected * 2
    assert several["usage"]["prompt_tokens"] == 2 * len(ids)


def test_token_ids_pass_by_the_template(client: Client, service: Any) -> None:
    """What /tokenize returns of a filled template answers as the text that fills it."""
    body = {"model": "spam", "prompt": "win a prize", "apply_template": True}
    document = answer_of(client.post("/tokenize", body))
    prompt = service.store.get("spam")
    assert document["tokens"] == prompt.encode("win a prize", 0)
    assert document["count"] == len(document["tokens"])
    assert document["max_model_len"] == prompt.context_length - prompt.virtual_tokens
    asked = {"model": "spam", "max_tokens": 6, "temperature": 0}
    by_ids = client.post(COMPLETIONS, {**asked, "prompt": document["tokens"]})
    by_text = client.post(COMPLETIONS, {**asked, "prompt": "win a prize"})
    assert texts_of(answer_of(by_ids)) == texts_of(answer_of(by_text))


def test_an_echo_stands_in_front_of_the_answer(client: Client) -> None:
    """Streamed or not, text and log-probabilities begin with the input's."""
    plain = answer_of(client.post(COMPLETIONS, {**FOX, "logprobs": 2}))["choices"][0]
    asked = {**FOX, "logprobs": 2, "echo": True}
    (echoed,) = answer_of(client.post(COMPLETIONS, asked))["choices"]
    assert echoed["text"] == "the fox" + plain["text"]
    told = echoed["logprobs"]
    before = len(told["tokens"]) - len(plain["logprobs"]["tokens"])
    assert "".join(told["tokens"][:before]) == "the fox"
    assert told["token_logprobs"][before:] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert told["text_offset"][before] == len("the fox")
    assert all(1 <= len(top) <= 3 for top in told["top_logprobs"][1:])
    chunks = chunks_of(client.post(COMPLETIONS, {**asked, "stream": True}))
    parts = [one for chunk in chunks for one in chunk["choices"]]
    assert "".join(one["text"] for one in parts) == echoed["text"]
    for name in ("tokens", "text_offset"):
        streamed = [entry for one in parts if one["logprobs"] for entry in one["logprobs"][name]]
        assert streamed == told[name]
    (bare,) = answer_of(client.post(COMPLETIONS, {**FOX, "echo": True}))["choices"]
    assert bare["text"] == echoed["text"] and bare["logprobs"] is None


def test_prompt_logprobs_in_vllm_s_shape(client: Client, backbone: Backbone) -> None:
    """Each position has the input's token with its rank, and the likeliest ones."""
    ids = ids_of(backbone, "the fox jumps")
    body = {**FOX, "prompt": ids, "prompt_logprobs": 2}
    (choice,) = answer_of(client.post(COMPLETIONS, body))["choices"]
    first, *told = choice["prompt_logprobs"]
    assert first is None and len(told) == len(ids) - 1
    for token, position in zip(ids[1:], told, strict=True):
        assert set(position[str(token)]) == {"logprob", "rank", "decoded_token"}
        assert position[str(token)]["decoded_token"] == backbone.tokenizer.decode([token])
        assert 2 <= len(position) <= 3
        ranks = sorted(entry["rank"] for entry in position.values())
        assert ranks[:2] == [1, 2]
    chat = answer_of(client.post(CHAT, {**TALK, "prompt_logprobs": 0}))
    assert len(chat["prompt_logprobs"]) == len(ids_of(backbone, "the fox"))
    assert "prompt_logprobs" not in answer_of(client.post(CHAT, TALK))
    plain = answer_of(client.post(COMPLETIONS, FOX))["choices"][0]
    assert set(plain) == {"index", "text", "finish_reason", "logprobs"}


# -- Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_n_answers_are_those_of_n_seeds(client: Client, path: str) -> None:
    """Answer k to an input is that of the seed plus k; the input counts once."""
    asked = {**(FOX if path == COMPLETIONS else TALK), "temperature": 1.0}
    single = [answer_of(client.post(path, {**asked, "seed": seed})) for seed in (7, 8, 9)]
    together = answer_of(client.post(path, {**asked, "seed": 7, "n": 3}))
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert texts_of(together) == [texts_of(one)[0] for one in single]
    assert len(set(texts_of(together))) > 1
    assert together["usage"]["prompt_tokens"] == single[0]["usage"]["prompt_tokens"]
    tokens = [one["usage"]["completion_tokens"] for one in single]
    assert together["usage"]["completion_tokens"] == sum(tokens)
    chunks = chunks_of(client.post(path, {**asked, "seed": 7, "n": 3, "stream": True}))
    for index, text in enumerate(texts_of(together)):
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        said = (one.get("text") or one.get("delta", {}).get("content") or "" for one in parts)
        assert "".join(said) == text


def test_n_of_several_prompts(client: Client) -> None:
    """The answers to one prompt follow each other."""
    body = {**FOX, "prompt": ["a", "the fox"], "n": 2, "best_of": 2}
    texts = texts_of(answer_of(client.post(COMPLETIONS, body)))
    alone = texts_of(answer_of(client.post(COMPLETIONS, {**FOX, "prompt": ["a", "the fox"]})))
    assert texts == [alone[0], alone[0], alone[1], alone[1]]


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2},
        {"logit_bias": {"5": 100}},
        {"min_tokens": 8, "stop_token_ids": list(range(2, 120))},
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_setting_changes_a_greedy_answer(
    client: Client, path: str, setting: dict[str, Any]
) -> None:
    """Each setting reaches the engine on both routes; vLLM's null leaves it out."""
    asked = FOX if path == COMPLETIONS else TALK
    plain = texts_of(answer_of(client.post(path, asked)))
    assert texts_of(answer_of(client.post(path, {**asked, **setting}))) != plain
    nothing = dict.fromkeys(setting)
    assert texts_of(answer_of(client.post(path, {**asked, **nothing}))) == plain


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"min_p": 1}])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_narrow_settings_reach_a_drawn_answer(
    client: Client, path: str, setting: dict[str, Any]
) -> None:
    """With one token to draw from, the answer is the greedy one."""
    asked = FOX if path == COMPLETIONS else TALK
    greedy = texts_of(answer_of(client.post(path, asked)))
    drawn = {**asked, "temperature": 1.9, "seed": 1}
    assert texts_of(answer_of(client.post(path, drawn))) != greedy
    assert texts_of(answer_of(client.post(path, {**drawn, **setting}))) == greedy


NOTHING: dict[str, Any] = {
    "n": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
    "frequency_penalty": 0.0, "logit_bias": {}, "ignore_eos": False, "min_tokens": 0,
    "stop_token_ids": [], "prompt_logprobs": None, "use_beam_search": False, "length_penalty": 1.0,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "bad_words": [],
    "truncate_prompt_tokens": None, "include_stop_str_in_output": False, "echo": False,
    "priority": 0, "user": "me",
}  # fmt: skip
IN_A_CHAT: dict[str, Any] = {
    "reasoning_effort": None, "verbosity": None, "audio": None, "prediction": None,
    "functions": None, "function_call": None, "tools": None, "tool_choice": None,
    "chat_template_kwargs": {}, "add_generation_prompt": True, "web_search_options": None,
}  # fmt: skip


def test_values_that_change_nothing_change_nothing(client: Client) -> None:
    """Defaults and nulls of OpenAI's and vLLM's fields are taken, and the answer is the same."""
    plain = answer_of(client.post(COMPLETIONS, FOX))["choices"]
    body = {**FOX, **NOTHING, "best_of": 1, "suffix": None}
    assert answer_of(client.post(COMPLETIONS, body))["choices"] == plain
    plain = answer_of(client.post(CHAT, TALK))["choices"]
    assert answer_of(client.post(CHAT, {**TALK, **NOTHING, **IN_A_CHAT}))["choices"] == plain


def test_an_empty_answer_of_the_assistant_in_a_chat(
    client: Client,
    chat_template: None,  # noqa: F811
) -> None:
    """Null content of the assistant is an empty text."""
    user = {"role": "user", "content": "the fox"}
    said = [
        answer_of(client.post(CHAT, {**TALK, "messages": [user, message, user]}))
        for message in (
            {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
            {"role": "assistant"},
            {"role": "assistant", "content": ""},
        )
    ]
    assert texts_of(said[0]) == texts_of(said[1]) == texts_of(said[2])
    messages = [user, {"role": "assistant", "content": None}, user]
    document = answer_of(client.post("/tokenize", {"model": "story", "messages": messages}))
    assert document["count"] == said[0]["usage"]["prompt_tokens"]


def test_a_constrained_answer_ends_where_its_text_has_to(client: Client) -> None:
    """ignore_eos and min_tokens give way to a constraint, of which n answers each have a guide."""
    asked = {"model": "trec", "max_tokens": 20, "seed": 1, "n": 3}
    ids = answer_of(client.post("/tokenize", {"prompt": "who is the fox"}))["tokens"]
    body = {**asked, "prompt": ids, "structured_outputs": {"choice": "labels"}}
    labels = {" a person", " a place", " a number of things"}
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 15}, {"repetition_penalty": 5.0}):
        document = answer_of(client.post(COMPLETIONS, {**body, **more}))
        assert set(texts_of(document)) <= labels, more
        assert {choice["finish_reason"] for choice in document["choices"]} == {"stop"}


# -- Refusals --------------------------------------------------------------------------------------

UNNAMED = ("model_not_found", "context_length_exceeded")
TEMPLATE = {"model": "story", "apply_template": True}
LONG = "the quick brown fox " * 12
MANY = {str(token): 1 for token in range(1025)}
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"n": 0}, "invalid_value", "n"),
    (COMPLETIONS, {"n": 129}, "invalid_value", "n"),
    (COMPLETIONS, {"n": 9}, "too_many_inputs", "n"),
    (COMPLETIONS, {"prompt": ["a"] * 3, "n": 3}, "too_many_inputs", "n"),
    (CHAT, {"n": 9}, "too_many_inputs", "n"),
    (COMPLETIONS, {"n": 2, "best_of": 4}, "unsupported_parameter", "best_of"),
    (COMPLETIONS, {"n": 2, "best_of": 1}, "unsupported_parameter", "best_of"),
    (COMPLETIONS, {"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
    (COMPLETIONS, {"allowed_token_ids": [1]}, "unsupported_parameter", "allowed_token_ids"),
    (COMPLETIONS, {"presence_penalty": 2.1}, "invalid_value", "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": "1"}, "invalid_value", "frequency_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    (COMPLETIONS, {"top_k": -2}, "invalid_value", "top_k"),
    (COMPLETIONS, {"min_p": 1.5}, "invalid_value", "min_p"),
    (COMPLETIONS, {"logit_bias": {"330": 1}}, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"fox": 1}}, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"logit_bias": MANY}, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [330]}, "invalid_value", "stop_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [1] * 129}, "invalid_value", "stop_token_ids"),
    (COMPLETIONS, {"min_tokens": 9}, "invalid_value", "min_tokens"),
    (CHAT, {"min_tokens": 9}, "invalid_value", "min_tokens"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True},
     "unsupported_parameter", "prompt_logprobs"),
    (COMPLETIONS, {"prompt": [1] * 200}, "context_length_exceeded", "prompt"),
    (COMPLETIONS, {"prompt": LONG, "echo": True}, "unsupported_operation", "echo"),
    (COMPLETIONS, {"model": "spam", "echo": True}, "unsupported_operation", "echo"),
    (CHAT, {"echo": True}, "unsupported_parameter", "echo"),
    (CHAT, {"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
     "invalid_value", "messages"),
    ("/tokenize", {}, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": "a", "messages": TALK["messages"]}, "invalid_value", "prompt"),
    ("/tokenize", {"prompt": "a", "apply_template": True}, "invalid_value", "model"),
    ("/tokenize", {"messages": TALK["messages"]}, "invalid_value", "model"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": False, **TEMPLATE},
     "invalid_value", "add_special_tokens"),
    ("/tokenize", {"prompt": "a", "return_token_str": True},
     "unsupported_parameter", "return_token_str"),
    ("/tokenize", {"model": "none", "prompt": "a"}, "model_not_found", "model"),
    ("/detokenize", {"tokens": [330]}, "invalid_value", "tokens"),
    ("/detokenize", {"tokens": [2**63]}, "invalid_value", "tokens"),
    ("/detokenize", {"tokens": "1 2"}, "invalid_value", "tokens"),
]  # fmt: skip


def test_what_can_t_be_done_is_refused_by_name(client: Client) -> None:
    """The error names the field, and the next request is answered."""
    for path, more, code, param in REFUSED:
        asked = {COMPLETIONS: FOX, CHAT: TALK}.get(path, {})
        answer = client.post(path, {**asked, **more})
        error = error_of(answer)
        assert 400 <= answer.status_code < 500, (more, error)
        assert (error["code"], error["param"]) == (code, param), (more, error)
        assert param in error["message"] or code in UNNAMED, (more, error)
    assert texts_of(answer_of(client.post(COMPLETIONS, FOX)))


def test_token_ids_can_t_say_where_virtual_tokens_stand(
    client: Client, registry: Any, make_artifact: Any, service: PromptService
) -> None:
    """A prompt whose template places them inside takes texts; their scores can be had."""
    registry.add("inner", 1, make_artifact("inner", template="a {*} movie: {text}"), "champion")
    service.store.refresh()
    error = error_of(client.post(COMPLETIONS, {**FOX, "model": "inner", "prompt": [5, 6]}))
    assert (error["code"], error["param"]) == ("unsupported_operation", "prompt")
    document = answer_of(client.post(COMPLETIONS, {**FOX, "model": "inner", "prompt_logprobs": 0}))
    told = document["choices"][0]["prompt_logprobs"]
    assert len(told) == document["usage"]["prompt_tokens"]


def test_an_encoder_s_input_has_no_log_probabilities(
    registry: Any, write_artifact: Any, tmp_path: Any
) -> None:
    """An encoder-decoder model is named in the refusal; its input's text can be echoed."""
    backbone = backbone_of("t5")
    folder = write_artifact(tmp_path / "t5", backbone, template="{text}")
    registry.add("story", 2, folder, "champion")
    store = PromptStore(backbone, registry)
    store.refresh()
    service = PromptService(store, ServingEngine(backbone))
    client = Client(service)
    for more, param in (
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ):
        error = error_of(client.post(COMPLETIONS, {**FOX, **more}))
        assert (error["code"], error["param"]) == ("unsupported_operation", param)
        assert "a seq2seq model does not predict its input" in error["message"]
    (plain,) = texts_of(answer_of(client.post(COMPLETIONS, FOX)))
    (echoed,) = texts_of(answer_of(client.post(COMPLETIONS, {**FOX, "echo": True})))
    assert echoed == "the fox" + plain
    service.close()


# -- /tokenize and /v1/models ----------------------------------------------------------------------


def test_tokenize_in_vllm_s_shape(client: Client, backbone: Backbone) -> None:
    """A text is tokenized alone, with the tokens' strings on demand."""
    ids = ids_of(backbone, "the fox")
    body = {"model": "story", "prompt": "the fox", "return_token_strs": True}
    document = answer_of(client.post("/tokenize", body))
    names = backbone.tokenizer.convert_ids_to_tokens(ids)
    assert document == {
        "count": len(ids),
        "max_model_len": 160 - 7,
        "tokens": ids,
        "token_strs": names,
    }
    bare = answer_of(client.post("/tokenize", {"prompt": "the fox"}))
    assert (bare["tokens"], bare["token_strs"], bare["max_model_len"]) == (ids, None, 160)
    assert answer_of(client.post("/tokenize", {"prompt": ""}))["tokens"] == []
    assert answer_of(client.post("/detokenize", {"tokens": []})) == {"prompt": ""}


def test_tokenize_of_a_conversation_counts_a_chat_s_tokens(client: Client) -> None:
    """The count is the usage of the same messages in a chat."""
    body = {"model": "story", "messages": TALK["messages"]}
    count = answer_of(client.post("/tokenize", body))["count"]
    assert count == answer_of(client.post(CHAT, TALK))["usage"]["prompt_tokens"]


def test_a_key_tokenizes_for_its_own_models(service: PromptService, tmp_path: Any) -> None:
    """Another model's template is as unknown as the model itself."""
    file = tmp_path / "keys.json"
    key = add_key(file, "few", ["story"])
    client = Client(service, Access(load_keys({"ORCHESTRATOR_API_KEYS_FILE": str(file)})))
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "spam", "prompt": "a", "apply_template": True}
    assert client.post("/tokenize", body, headers=headers).status_code == 404
    assert client.post("/tokenize", {"prompt": "a"}).status_code == 401
    assert client.post("/tokenize", {"prompt": "a"}, headers=headers).status_code == 200
