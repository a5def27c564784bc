"""The HTTP routes without Ray: answers, and every way in which a request can be wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine.engine import EngineLimits, ServingEngine
from orchestrator.serving.http.access import Access, is_loopback, load_keys
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.http.tracing import Tracer
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.store import PromptStore


class Client:
    """A client that sends one request at a time to the application, in this process."""

    def __init__(
        self, service: PromptService, access: Access | None = None, tracer: Tracer | None = None
    ) -> None:
        self.api = make_api(service, access, tracer)

    def send(
        self, method: str, path: str, base: str = "http://localhost", **options: Any
    ) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        return self.send("POST", path, content=content, **options)


@pytest.fixture
def client(service: PromptService) -> Client:
    return Client(service)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error, after a check that it has OpenAI's shape."""
    document = answer.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    return dict(document["error"])


def test_models(client: Client, model_folder: Any) -> None:
    """The list has every served prompt with its base model, version and alias.

    A prompt's id gives its entry alone.
    """
    document = client.get("/v1/models").json()
    assert document["object"] == "list"
    spam = next(it for it in document["data"] if it["id"] == "spam")
    assert spam.pop("created") > 1_700_000_000
    assert spam == {
        "id": "spam",
        "object": "model",
        "owned_by": "orchestrator",
        "root": str(model_folder),
        "parent": str(model_folder),
        "version": 1,
        "alias": "champion",
        "labels": [0, 1],
    }
    assert client.get("/v1/models/story").json()["labels"] is None
    assert error_of(client.get("/v1/models/none"))["code"] == "model_not_found"


def test_classify_equals_offline(client: Client, backbone: Backbone, registry: Any) -> None:
    """Labels keep their type, probabilities sum to 1, and both are the offline model's."""
    texts = ["win a prize", "the quick brown fox " * 9]
    answer = client.post(
        "/classify", {"model": "spam", "input": [texts[0], {"text": texts[1], "other": None}]}
    )
    assert answer.status_code == 200
    document = answer.json()
    assert (document["object"], document["model"]) == ("list", "spam")
    expected = OfflineModel.from_artifact(registry.folders["spam", 1], backbone).classify(texts)
    for index, (got, want) in enumerate(zip(document["data"], expected, strict=True)):
        assert (got["index"], got["label"], set(got["probs"])) == (index, want["label"], {"0", "1"})
        assert math.isclose(sum(got["probs"].values()), 1, abs_tol=1e-6)
        assert got["probs"] == pytest.approx(want["probs"], abs=1e-5)


def test_a_single_text_or_row_may_stand_alone(client: Client) -> None:
    """A single text or row means the same as a list of one."""
    alone = client.post("/classify", {"model": "spam", "input": "win"}).json()
    listed = client.post("/classify", {"model": "spam", "input": ["win"]}).json()
    row = client.post("/classify", {"model": "spam", "input": {"text": "win"}}).json()
    for other in (listed, row):
        assert other["data"][0]["probs"] == pytest.approx(alone["data"][0]["probs"], abs=1e-6)
    rows = {"model": "trec", "input": {"question": "who?", "topic": 3}}
    assert client.post("/classify", rows).json()["data"][0]["label"] in (
        "person",
        "place",
        "number",
    )


def test_boolean_labels(
    client: Client, registry: Any, make_artifact: Any, service: PromptService
) -> None:
    """A boolean label keeps its type, and its key is written as in JSON."""
    registry.add(
        "bool",
        1,
        make_artifact("bool", verbalizer={True: " yes", False: " no", "1": " one"}),
        "champion",
    )
    service.store.refresh()
    row = client.post("/classify", {"model": "bool", "input": "win"}).json()["data"][0]
    assert set(row["probs"]) == {"true", "false", "1"}
    assert row["label"] is True or row["label"] is False or row["label"] == "1"


def test_completions(client: Client, backbone: Backbone, registry: Any) -> None:
    """Text goes through the template, each prompt gives a choice, and usage counts tokens."""
    body = {
        "model": "story",
        "prompt": ["a", "the quick brown"],
        "temperature": 0,
        "max_tokens": 6,
        "user": "me",
    }
    document = client.post("/v1/completions", body).json()
    offline = OfflineModel.from_artifact(registry.folders["story", 1], backbone)
    expected = [row.text for row in offline.complete(["a", "the quick brown"])]
    assert [choice["index"] for choice in document["choices"]] == [0, 1]
    for choice, text in zip(document["choices"], expected, strict=True):
        assert text.startswith(choice["text"])
    inputs = sum(len(offline.prompt.encode(text, 6)) for text in ("a", "the quick brown"))
    assert document["usage"]["prompt_tokens"] == inputs
    assert document["usage"]["total_tokens"] == inputs + document["usage"]["completion_tokens"]
    assert document["object"] == "text_completion"


def test_completions_default_to_sixteen_tokens(client: Client) -> None:
    """Sixteen is OpenAI's default, also when the request has null."""
    body = {
        "model": "story",
        "prompt": "a",
        "max_tokens": None,
        "seed": 1,
        "n": 1,
        "logit_bias": None,
        "stop": ["\0"],
    }
    document = client.post("/v1/completions", body).json()
    assert document["usage"]["completion_tokens"] <= 16
    assert document["choices"][0]["finish_reason"] in ("length", "stop")


def test_long_inputs_are_cut_as_in_training_and_refused_beyond_the_context(client: Client) -> None:
    """max_input_tokens (64) cuts inputs; context_length (160) limits what may be sent."""
    cut = client.post("/classify", {"model": "spam", "input": "win a prize " * 10})
    assert cut.status_code == 200
    error = error_of(
        client.post("/classify", {"model": "spam", "input": ["ok", "win a prize " * 100]})
    )
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "160" in error["message"]
    body = {"model": "story", "prompt": "a", "max_tokens": 10**9}
    assert error_of(client.post("/v1/completions", body))["code"] == "context_length_exceeded"


BAD: list[tuple[str, Any, int, str, str | None]] = [
    ("/classify", b"", 400, "invalid_json", None),
    ("/classify", b"{", 400, "invalid_json", None),
    ("/classify", b"\xff\xfe", 400, "invalid_json", None),
    ("/classify", b'{"model": "spam", "input": "\\ud800"}', 400, "invalid_json", None),
    ("/classify", b"[" * 10_000, 400, "invalid_json", None),
    ("/classify", "[]", 400, "invalid_value", None),
    ("/classify", {"input": "x"}, 400, "invalid_value", "model"),
    ("/classify", {"model": "spam"}, 400, "invalid_value", "input"),
    ("/classify", {"model": 3, "input": "x"}, 400, "invalid_value", "model"),
    ("/classify", {"model": "", "input": "x"}, 400, "invalid_value", "model"),
    ("/classify", {"model": "s" * 1000, "input": "x"}, 400, "invalid_value", "model"),
    ("/classify", {"model": "spam", "input": []}, 400, "invalid_value", "input"),
    ("/classify", {"model": "spam", "input": None}, 400, "invalid_value", "input"),
    ("/classify", {"model": "spam", "input": [1]}, 400, "invalid_value", "input"),
    ("/classify", {"model": "spam", "input": [["x"]]}, 400, "invalid_value", "input"),
    ("/classify", {"model": "spam", "input": [{"text": None}]}, 400, "invalid_value", "input"),
    (
        "/classify",
        {"model": "trec", "input": {"question": "x", "topic": None}},
        400,
        "invalid_value",
        "input",
    ),
    ("/classify", '{"model": "spam", "input": {"text": [NaN]}}', 400, "invalid_value", "input"),
    ("/classify", '{"model": "spam", "input": {"text": [-1e999]}}', 400, "invalid_value", "input"),
    (
        "/classify",
        {"model": "spam", "input": [{"text": "x"}, {"txt": "x"}]},
        400,
        "invalid_value",
        "input",
    ),
    ("/classify", '{"model": "spam", "input": {"text": 1e999}}', 400, "invalid_value", "input"),
    ("/classify", '{"model": "spam", "input": {"text": NaN}}', 400, "invalid_value", "input"),
    (
        "/classify",
        {"model": "trec", "input": "one text for two columns"},
        400,
        "invalid_value",
        "input",
    ),
    ("/classify", {"model": "spam", "input": ["x"] * 9}, 400, "too_many_inputs", "input"),
    ("/classify", {"model": "story", "input": "x"}, 400, "unsupported_operation", "model"),
    (
        "/classify",
        {"model": "spam", "inputs": "x", "input": "x"},
        400,
        "unsupported_parameter",
        "inputs",
    ),
    ("/classify", {"model": "spam", "input": "x" * 30_000}, 413, "body_too_large", None),
    ("/classify", {"model": "sapm", "input": "x"}, 404, "model_not_found", "model"),
    ("/classify", {"model": "spam:9", "input": "x"}, 404, "model_not_found", "model"),
    ("/classify", {"model": "spam@none", "input": "x"}, 404, "model_not_found", "model"),
    ("/v1/completions", {"model": "none", "prompt": "x"}, 404, "model_not_found", "model"),
    ("/v1/completions", {"model": "story"}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": []}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": [1.5]}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": [[]]}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": [330]}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": [-1]}, 400, "invalid_value", "prompt"),
    ("/v1/completions", {"model": "story", "prompt": ["x"] * 9}, 400, "too_many_inputs", "prompt"),
    ("/v1/completions", {"model": "trec", "prompt": "x"}, 400, "invalid_value", "prompt"),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "max_tokens": 0},
        400,
        "invalid_value",
        "max_tokens",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "max_tokens": "5"},
        400,
        "invalid_value",
        "max_tokens",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "temperature": -1},
        400,
        "invalid_value",
        "temperature",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "temperature": 3},
        400,
        "invalid_value",
        "temperature",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "top_p": 0},
        400,
        "invalid_value",
        "top_p",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "stop": [""]},
        400,
        "invalid_value",
        "stop",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "stop": ["a"] * 5},
        400,
        "invalid_value",
        "stop",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "seed": 2**70},
        400,
        "invalid_value",
        "seed",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "n": 1000},
        400,
        "invalid_value",
        "n",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "best_of": 2},
        400,
        "unsupported_parameter",
        "best_of",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "echo": "yes"},
        400,
        "invalid_value",
        "echo",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "logprobs": 6},
        400,
        "invalid_value",
        "logprobs",
    ),
    (
        "/v1/completions",
        {"model": "story", "prompt": "x", "max_token": 9},
        400,
        "unsupported_parameter",
        "max_token",
    ),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), BAD)
def test_bad_requests(
    client: Client, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    """Each refusal has its status and code, names the wrong field, and has OpenAI's shape."""
    answer = client.post(path, body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error"


def test_misspelled_fields_are_corrected(client: Client) -> None:
    """An unknown field is refused with the nearest known one."""
    error = error_of(
        client.post("/v1/completions", {"model": "story", "prompt": "x", "max_token": 9})
    )
    assert error["message"] == "'max_token' is not recognised; did you mean 'max_tokens'?"


def test_a_large_body_is_refused_while_it_arrives(client: Client) -> None:
    """A body without a declared length is cut off at the limit."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = client.send("POST", "/classify", content=endless())
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_unknown_routes_and_methods(client: Client) -> None:
    """Answers for unknown routes and methods have OpenAI's shape, too."""
    for path in ("/", "/v1/embeddings", "/docs", "/redoc"):
        answer = client.get(path)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "route_not_found")
    answer = client.get("/classify")
    assert (answer.status_code, error_of(answer)["code"], answer.headers["allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )
    assert client.post("/v1/models", {}).status_code == 405


def test_internal_errors_tell_nothing(
    client: Client, service: PromptService, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """An unexpected error is a 500 in OpenAI's shape; its text is only in the log."""

    async def explode(*_: Any) -> Any:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(service.engine, "classify", explode)
    answer = client.post("/classify", {"model": "spam", "input": "x"})
    assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")
    assert "secret" not in answer.text and "secret" in caplog.text


def test_overload_asks_to_come_back(backbone: Backbone, registry: Any) -> None:
    """A full waiting line gives 429 with Retry-After."""
    engine = ServingEngine(backbone, EngineLimits(max_waiting=1))
    store = PromptStore(backbone, registry)
    store.refresh()
    service = PromptService(store, engine)
    answer = Client(service).post("/classify", {"model": "spam", "input": ["a", "b"]})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert error_of(answer)["type"] == "rate_limit_error"
    service.close()


def test_an_outage_of_the_registry_is_unavailable(client: Client, registry: Any) -> None:
    """Loaded prompts answer; a prompt that must be fetched gives 503 with Retry-After."""
    registry.away = True
    assert client.post("/classify", {"model": "spam", "input": "x"}).status_code == 200
    answer = client.post("/classify", {"model": "spam:2", "input": "x"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
    assert "retry-after" in answer.headers


def test_health_and_metrics(client: Client, service: PromptService) -> None:
    """Health follows the engine; metrics count routes by pattern, not by client input."""
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/classify", {"model": "spam", "input": "x"})
    client.get("/v1/models/made-up")
    client.get("/made-up")
    text = client.get("/metrics").text
    assert 'orchestrator_requests_total{model="spam",route="/classify",status="200"} 1.0' in text
    assert (
        'orchestrator_requests_total{model="",route="/v1/models/{model:path}",status="404"} 1.0'
        in text
    )
    assert 'orchestrator_requests_total{model="",route="other",status="404"} 1.0' in text
    assert "orchestrator_loaded_prompts 3.0" in text
    assert "made-up" not in text
    service.engine.close()
    assert client.get("/health").status_code == 503


def test_keys(service: PromptService) -> None:
    """With keys every route except /health needs one, also routes that don't exist."""
    keys = load_keys({"ORCHESTRATOR_API_KEYS": " first, second,"})
    assert len(keys) == 2
    client = Client(service, Access(keys))
    assert client.get("/health", base="http://elsewhere").status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing", "/health/", "//health"):
        for header in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Bearer"},
        ):
            answer = client.get(path, headers=header)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    for key in ("first", "second"):
        answer = client.get(
            "/v1/models", base="http://elsewhere", headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 200
    assert hashlib.sha256(b"first").hexdigest() == keys[0].sha256


def test_without_keys_only_local_names_are_answered(client: Client) -> None:
    """A web page that points its own name at 127.0.0.1 can't read anything."""
    for base in ("http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost"):
        assert client.get("/v1/models", base=base).status_code == 200
    for base in ("http://attacker.example", "http://127.0.0.1.attacker.example:8000"):
        assert client.get("/v1/models", base=base).status_code == 403
    assert [
        is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1")
    ] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda it: st.lists(it, max_size=3) | st.dictionaries(st.text(), it, max_size=3)
)
FIELDS = st.sampled_from(
    [
        "model",
        "input",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "n",
        "stream",
        "logprobs",
        "user",
        "echo",
        "logit_bias",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop_token_ids",
        "prompt_logprobs",
        "tokens",
        "messages",
    ]
)
ROWS = st.lists(
    st.text(max_size=30) | st.dictionaries(st.just("text"), SCALARS, max_size=1), max_size=3
)
FUZZED = ["/classify", "/v1/completions", "/tokenize", "/detokenize"]
TOKENS = st.lists(st.integers(-1, 340), max_size=5)
BODIES = st.dictionaries(FIELDS | st.text(max_size=5), VALUES, max_size=6) | st.fixed_dictionaries(
    {"model": st.sampled_from(["spam", "story", "trec", "spam:1", "x"])},
    optional={
        "input": ROWS | st.text(),
        "prompt": st.text() | st.lists(st.text(), max_size=2) | TOKENS | st.lists(TOKENS),
        "max_tokens": st.integers(-1, 20) | SCALARS,
        "tokens": TOKENS,
        "n": st.integers(-1, 9),
        "echo": st.booleans(),
        "logprobs": st.integers(-1, 6),
        "prompt_logprobs": st.integers(-1, 21),
        "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100)),
        "repetition_penalty": st.floats(0, 100),
        "top_k": st.integers(-1, 400),
        "min_p": st.floats(0, 1),
        "stop_token_ids": TOKENS,
        "temperature": st.floats(0, 2) | SCALARS,
        "top_p": st.floats(0, 1) | SCALARS,
        "stop": st.lists(st.text(max_size=3), max_size=2) | SCALARS,
        "seed": SCALARS,
    },
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from(FUZZED), body=BODIES | VALUES)
def test_no_body_is_an_internal_error(client: Client, path: str, body: Any) -> None:
    """Any JSON body gets a result or a well-formed refusal."""
    answer = client.post(path, body)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error_of(answer)
    else:
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
