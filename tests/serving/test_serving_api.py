"""The API over a real socket with the official client.

Streams, chat, canaries, keys, and clients that hang up.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone
from orchestrator.registry import Canary
from orchestrator.serving.engine.generation import GenerationBatch, GenerationRow, Sampling
from orchestrator.serving.http.access import Access, Allowance, add_key, load_keys, read_keys
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.offline import OfflineModel

CHAT = (
    "{% for it in messages %}{% if it.role == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}<{{ it.role }}>{{ it.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def listen(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Return a function that starts a server on a free port and returns its address."""

    def start(service: PromptService, access: Access | None = None) -> str:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(make_api(service, access), log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def stop() -> None:
            server.should_exit = server.force_exit = True
            thread.join()

        request.addfinalizer(stop)
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    return start


@pytest.fixture
def url(service: PromptService, listen: Callable[..., str]) -> str:
    return listen(service)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def chat_template(backbone: Backbone) -> Iterator[None]:
    """Give the base model's tokenizer a chat template for one test."""
    backbone.tokenizer.chat_template = CHAT
    yield
    backbone.tokenizer.chat_template = None


def offline(backbone: Backbone, registry: Any, name: str) -> OfflineModel:
    return OfflineModel.from_artifact(registry.folders[name, 1], backbone)


@pytest.mark.parametrize(
    "more", [{"temperature": 0}, {"temperature": 1.3, "seed": 5, "top_p": 0.9}, {"logprobs": 2}]
)
def test_a_streamed_completion_is_the_plain_one(
    client: openai.OpenAI, more: dict[str, Any]
) -> None:
    """The chunks of several prompts add up to the whole answer.

    That holds for text, finish reasons, log-probabilities and usage.
    """
    asked: dict[str, Any] = {
        "model": "story",
        "prompt": ["a", "the fox"],
        "max_tokens": 12,
        "seed": 1,
        **more,
    }
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id != whole.id
    for choice in whole.choices:
        mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(one.text for one in mine) == choice.text and len(mine) > 1
        reasons: list[Any] = [one.finish_reason for one in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice.finish_reason]
        tokens = [token for one in mine if one.logprobs for token in one.logprobs.tokens or ()]
        assert tokens == ((choice.logprobs.tokens or []) if choice.logprobs else [])
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (
        {chunk.system_fingerprint for chunk in chunks} == {"story:1"} == {whole.system_fingerprint}
    )


def test_logprobs_in_openai_s_shape(client: openai.OpenAI) -> None:
    """Every list has one entry per token.

    The taken token is among the likeliest ones, of which there are as many as requested.
    """
    made = client.completions.create(
        model="story", prompt="a", max_tokens=4, temperature=0, logprobs=3
    )
    told: Any = made.choices[0].logprobs
    assert made.usage is not None
    assert (
        len(told.tokens)
        == len(told.token_logprobs)
        == len(told.text_offset)
        == made.usage.completion_tokens
    )
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == value == max(top.values()) <= 0 and 1 <= len(top) <= 3
    assert told.text_offset[0] == 0


def test_chat_without_a_chat_template(
    client: openai.OpenAI, backbone: Backbone, registry: Any
) -> None:
    """One user message is a completion's text; a conversation is refused with the reason."""
    asked: dict[str, Any] = {"model": "story", "temperature": 0, "max_tokens": 8}
    chat = client.chat.completions.create(
        **asked, messages=[{"role": "user", "content": "the fox"}]
    )
    plain = client.completions.create(**asked, prompt="the fox")
    assert chat.choices[0].message.content == plain.choices[0].text
    assert (chat.usage, chat.object) == (plain.usage, "chat.completion")
    conversation: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the fox"},
    ]
    with pytest.raises(openai.BadRequestError, match="has no chat template") as refused:
        client.chat.completions.create(**asked, messages=conversation)
    assert (refused.value.code, refused.value.param) == ("chat_template_missing", "messages")


@pytest.mark.parametrize("name", ["story", "trec", "spam"])
def test_the_chat_template_stands_around_the_prompt_s_own(
    client: openai.OpenAI, backbone: Backbone, registry: Any, chat_template: None, name: str
) -> None:
    """The chat template wraps the prompt's own, which is filled with the last message.

    The soft prompt stands in front, as in tuning. The text is that of generation on exactly these
    tokens.
    """
    twin = offline(backbone, registry, name)
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " dog"}],
        },
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "the fox"},
    ]
    asked: dict[str, Any] = {
        "model": name,
        "messages": messages,
        "temperature": 0,
        "max_completion_tokens": 8,
    }
    if name == "trec":  # its template has two columns
        with pytest.raises(openai.BadRequestError, match="a bare text can't fill"):
            client.chat.completions.create(**asked)
        return
    filled = twin.prompt.encoder.template.fill({"text": "the fox"})
    rendered = f"<system>Be brief.\n<user>one dog\n<assistant>yes\n<user>{filled}\n<assistant>"
    row = GenerationRow(twin.prompt, backbone.tokenizer(rendered)["input_ids"], Sampling(8, 0.0))
    batch = GenerationBatch(backbone, [row])
    while row.completion is None:
        batch.step()
    made = client.chat.completions.create(**asked)
    assert made.choices[0].message.content == row.completion.text
    assert made.usage is not None and made.usage.prompt_tokens == len(row.input_ids)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == row.completion.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason
    assert chunks[-1].usage == made.usage


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """The bytes are the token's, and there are as many likeliest tokens as requested."""
    made = client.chat.completions.create(
        model="story",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert made.choices[0].logprobs is not None
    for one in made.choices[0].logprobs.content or ():
        assert bytes(one.bytes or ()).decode() == one.token
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": "hello"}, "invalid_value", "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
     "invalid_value", "messages"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "a"}] * 300}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "x"}]},
     "unsupported_parameter", "tools"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
     "unsupported_parameter", "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "stream_options": {}},
     "unsupported_parameter", "stream_options"),
    ({"messages": [{"role": "user", "content": "a" * 3000}]},
     "context_length_exceeded", "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 1000},
     "invalid_value", "stop"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 0},
     "invalid_value", "max_tokens"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**9},
     "context_length_exceeded", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chats_are_refused_before_a_stream_begins(
    url: str, body: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    """A refusal is a status with OpenAI's error, not an event of a stream."""
    sent = {"model": "story", **body, **({"stream": True} if stream else {})}
    if stream and "stream_options" in body:
        return
    answer = httpx.post(f"{url}/v1/chat/completions", json=sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error


def test_a_conversation_that_the_template_refuses(
    client: openai.OpenAI, chat_template: None
) -> None:
    """The error has the message with which the base model's template refuses it."""
    messages: Any = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(openai.BadRequestError, match="system first"):
        client.chat.completions.create(model="story", messages=messages)


def test_every_answer_has_a_request_id(client: openai.OpenAI, url: str) -> None:
    """Successes and refusals have an id, and no two have the same."""
    ids = {
        httpx.get(f"{url}{path}").headers["x-request-id"]
        for path in ("/health", "/v1/models", "/nothing")
    }
    ids.add(str(client.completions.create(model="story", prompt="a", max_tokens=1)._request_id))
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="none", prompt="a")
    ids.add(str(refused.value.request_id))
    assert len(ids) == 5 and all(one.startswith("req_") for one in ids)


def until(condition: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture
def endless(backbone: Backbone, registry: Any) -> str:
    """A text whose greedy continuation does not end by itself."""
    sampling = Sampling(140, 0.0)
    twin = offline(backbone, registry, "story")
    candidates = ["a", "the fox", "win", "dogs", "movie"]
    return next(
        text for text in candidates if twin.complete([text], sampling)[0].finish_reason == "length"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(
    url: str, service: PromptService, endless: str, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Rows end once their client is gone, streamed or not; other requests are answered."""
    step = GenerationBatch.step
    monkeypatch.setattr(GenerationBatch, "step", lambda batch: (time.sleep(0.02), step(batch))[1])
    body = {
        "model": "story",
        "prompt": endless,
        "max_tokens": 140,
        "temperature": 0,
        "stream": stream,
    }
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        assert until(lambda: service.engine.running == 1)
    assert until(lambda: service.engine.running == 0)
    text = service.metrics.text().decode()
    steps = next(
        line
        for line in text.splitlines()
        if line.startswith('orchestrator_batch_rows_count{kind="generate"')
    )
    assert float(steps.split()[-1]) < 140
    assert (
        httpx.post(
            f"{url}/v1/completions", json={**body, "max_tokens": 1, "stream": False}
        ).status_code
        == 200
    )


def test_slow_readers_hold_nobody_up(url: str, service: PromptService, endless: str) -> None:
    """Streams that nobody reads end as any other; other requests are answered meanwhile."""
    body = json.dumps(
        {"model": "story", "prompt": endless, "max_tokens": 140, "temperature": 0, "stream": True}
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = url.removeprefix("http://").split(":")
    readers = [socket.create_connection((host, int(port))) for _ in range(5)]
    for reader in readers:
        reader.sendall((head + body).encode())
    plain = {"model": "story", "prompt": "a", "max_tokens": 2, "temperature": 0}
    assert httpx.post(f"{url}/v1/completions", json=plain).status_code == 200
    assert until(
        lambda: "orchestrator_first_token_seconds_count" in service.metrics.text().decode()
    )
    assert until(lambda: service.engine.running == 0 and service.engine.waiting == 0)
    for reader in readers:
        reader.close()


def test_bytes_that_are_no_request(url: str) -> None:
    """Malformed bytes on the socket do not affect the next request."""
    host, port = url.removeprefix("http://").split(":")
    for sent in (
        b"\0" * 100,
        b"GET / HTTP/9\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\xff\xfe",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    long = httpx.get(f"{url}/v1/models/{'a' * 5000}")
    assert (long.status_code, long.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(f"{url}/health").status_code == 200


def test_every_name_that_requests_may_use_can_be_looked_up(
    url: str, client: openai.OpenAI, registry: Any
) -> None:
    """Versions and aliases can be looked up, percent-encoded or not.

    The entry has the version that answers and its alias, if it has any.
    """
    registry.add("story", 2, registry.folders["story", 1])
    for path, expected in (
        ("story", ("story", 1, "champion")),
        ("story:1", ("story:1", 1, "champion")),
        ("story%3A1", ("story:1", 1, "champion")),
        ("story:2", ("story:2", 2, "")),
        ("story@champion", ("story", 1, "champion")),
        ("story%40champion", ("story", 1, "champion")),
        ("models:/story/2", ("models:/story/2", 2, "")),
        ("models%3A%2Fstory%2F2", ("models:/story/2", 2, "")),
    ):
        answer = httpx.get(f"{url}/v1/models/{path}")
        found = answer.json()
        assert answer.status_code == 200, (path, found)
        assert (found["id"], found["version"], found["alias"]) == expected
        assert client.completions.create(model=found["id"], prompt="a", max_tokens=1).choices
    assert client.models.retrieve("story:1").id == "story:1"


def test_a_version_that_never_existed_is_not_found(url: str, client: openai.OpenAI) -> None:
    """The answer is 404 and says that there is no such version, however often it is sent."""
    for _ in range(2):
        answer = httpx.get(f"{url}/v1/models/story:99")
        assert answer.status_code == 404
        assert "'story' has no version 99" in answer.json()["error"]["message"]
        with pytest.raises(openai.NotFoundError, match="'story' has no version 99"):
            client.completions.create(model="story:99", prompt="a")
    absent = httpx.get(f"{url}/v1/models/none:1")
    assert (
        absent.status_code == 404 and "'none:1' does not exist" in absent.json()["error"]["message"]
    )


def test_a_request_that_takes_too_long_ends(
    url: str, service: PromptService, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain request gets 504.

    A stream, whose status is sent already, ends with an error that the client raises.
    """
    step = GenerationBatch.step
    monkeypatch.setattr(GenerationBatch, "step", lambda batch: (time.sleep(0.05), step(batch))[1])
    service.limits = type(service.limits)(seconds=0.3)
    body = {"model": "story", "prompt": endless, "max_tokens": 140, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="longer than this server allows"):
        list(
            client.completions.create(
                model="story", prompt=endless, max_tokens=140, temperature=0, stream=True
            )
        )
    assert until(lambda: service.engine.running == 0)


# -- Canaries --------------------------------------------------------------------------------------


def test_a_canary_takes_its_share_of_a_name(
    url: str, service: PromptService, registry: Any, make_artifact: Any, backbone: Backbone
) -> None:
    """Both versions answer to a bare name, the canary in about its share.

    A name with an alias is never redirected, and each answer is that of the version that it names.
    After the end of the canary, the champion answers alone.
    """
    registry.add(
        "story", 2, make_artifact("story-2", tokens=5, seed=8, template="{text}"), "challenger"
    )
    registry.canaries["story"] = Canary("challenger", 30)
    service.store.refresh()
    texts = {
        f"story:{version}": OfflineModel.from_artifact(registry.folders["story", version], backbone)
        .complete(["the fox"], Sampling(4, 0.0))[0]
        .text
        for version in (1, 2)
    }
    assert len(set(texts.values())) == 2

    def ask(model: str, times: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        body = {"model": model, "prompt": "the fox", "max_tokens": 4, "temperature": 0}
        with httpx.Client(base_url=url) as http:
            for _ in range(times):
                answer = http.post("/v1/completions", json=body).json()
                assert answer["choices"][0]["text"] == texts[answer["system_fingerprint"]]
                seen[answer["system_fingerprint"]] += 1
        return seen

    assert (
        15 < ask("story", 150)["story:2"] < 80
    )  # 45 expected; six standard deviations to each side
    assert ask("story@champion", 5) == {"story:1": 5} and ask("story@challenger", 5) == {
        "story:2": 5
    }
    registry.canaries.clear()
    service.store.refresh()
    assert ask("story", 30) == {"story:1": 30}


def test_a_canary_that_can_t_be_had_is_the_champion(
    url: str, service: PromptService, registry: Any, tmp_path: Path
) -> None:
    """A bad version behind the canary's alias is refused, and the champion answers all."""
    registry.add("story", 2, tmp_path / "nowhere", "challenger")
    registry.canaries["story"] = Canary("challenger", 100)
    service.store.refresh()
    answer = httpx.post(
        f"{url}/v1/completions", json={"model": "story", "prompt": "a", "max_tokens": 1}
    )
    assert answer.json()["system_fingerprint"] == "story:1"
    assert (
        'orchestrator_refused_version{model="story",version="2"} 1.0'
        in service.metrics.text().decode()
    )


# -- Keys ------------------------------------------------------------------------------------------


def test_a_key_has_its_models_and_its_rate(
    service: PromptService, listen: Callable[..., str], tmp_path: Path
) -> None:
    """A key sees only its models, and beyond its rate is told when to come back.

    Other keys are not affected.
    """
    file = tmp_path / "keys.json"
    few, all_ = add_key(file, "few", ["story"], per_minute=3), add_key(file, "all")
    assert few not in file.read_text() and file.stat().st_mode & 0o077 == 0
    url = listen(service, Access(load_keys({"ORCHESTRATOR_API_KEYS_FILE": str(file)})))
    first, second = (
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in (few, all_)
    )
    assert [one.id for one in first.models.list()] == ["story"]
    with pytest.raises(openai.NotFoundError):
        first.completions.create(model="spam", prompt="a")
    assert first.completions.create(model="story", prompt="a", max_tokens=1).choices
    with pytest.raises(openai.RateLimitError) as refused:
        first.completions.create(model="story", prompt="a")
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 20
    assert [one.id for one in second.models.list()] == ["spam", "story", "trec"]


def test_allowances_come_back_with_time() -> None:
    """A minute's requests may come at once; then each is regained after its time."""
    now = 0.0
    allowance = Allowance(2, lambda: now)
    assert [allowance.take(), allowance.take()] == [0, 0]
    assert allowance.take() == pytest.approx(30)
    now = 31.0
    assert allowance.take() == 0 and allowance.take() > 0


def test_broken_key_files_and_second_names(tmp_path: Path) -> None:
    """The message names the file, and a key's name can be used only once."""
    file = tmp_path / "keys.json"
    for text in ("", "{}", '[{"name": "a", "sha256": "short"}]', '[{"name": "a", "key": "clear"}]'):
        file.write_text(text)
        with pytest.raises(BadInput, match=r"keys\.json"):
            read_keys(file)
    file.unlink()
    with pytest.raises(BadInput, match=r"keys\.json"):
        load_keys({"ORCHESTRATOR_API_KEYS_FILE": str(file)})
    add_key(file, "a")
    with pytest.raises(BadInput, match="has a key 'a'"):
        add_key(file, "a")


def test_every_route_needs_a_key(service: PromptService, listen: Callable[..., str]) -> None:
    """Every route needs a key, existing or not, except /health."""
    url = listen(service, Access(load_keys({"ORCHESTRATOR_API_KEYS": "secret"})))
    api: Any = make_api(PromptService(service.store, service.engine))
    routes = [(method, route.path) for route in api.routes for method in sorted(route.methods)]
    assert ("POST", "/v1/chat/completions") in routes and ("GET", "/openapi.json") in routes
    for method, path in [
        *routes,
        ("GET", "/none"),
        ("OPTIONS", "/v1/models"),
        ("HEAD", "/metrics"),
    ]:
        status = httpx.request(method, f"{url}{path}").status_code
        assert status == (200 if path == "/health" else 401), (method, path)


def test_without_keys_other_machines_are_refused() -> None:
    """The peer's address counts, so a client can't claim to be local."""
    access = Access()
    access.check("/v1/models", {"host": "localhost"}, "127.0.0.1")
    access.check("/v1/models", {"host": "localhost"}, "::1")
    access.check("/v1/models", {"host": "localhost"}, None)
    with pytest.raises(Exception, match="localhost only"):
        access.check("/v1/models", {"host": "localhost"}, "10.0.0.7")


# -- Seen from outside -----------------------------------------------------------------------------


def test_metrics_by_model(client: openai.OpenAI, url: str) -> None:
    """Requests, tokens, first-token times and store counts have the model's name."""
    made = client.completions.create(model="story", prompt="a", max_tokens=3, temperature=0)
    list(
        client.completions.create(
            model="story@champion", prompt="a", max_tokens=3, temperature=0, stream=True
        )
    )
    text = httpx.get(f"{url}/metrics").text
    assert made.usage is not None
    for line in (
        'orchestrator_requests_total{model="story",route="/v1/completions",status="200"} 2.0',
        'orchestrator_tokens_total{kind="completion",model="story"} '
        f"{2 * made.usage.completion_tokens}.0",
        'orchestrator_tokens_total{kind="prompt",model="story"} '
        f"{2 * made.usage.prompt_tokens}.0",
        'orchestrator_first_token_seconds_count{model="story"} 2.0',
        'orchestrator_prompt_hits_total{model="story"} 2.0',
        'orchestrator_prompt_loads_total{model="story"} 1.0',
        'orchestrator_version{alias="champion",model="story"} 1.0',
        "orchestrator_running_rows 0.0",
        "orchestrator_waiting_rows 0.0",
    ):
        assert line in text, line


def test_the_access_log_is_json_without_texts(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    """Each request logs one JSON line with its facts, and nothing that the client wrote."""
    with caplog.at_level(logging.INFO, "orchestrator.access"):
        client.completions.create(model="story", prompt="very private", max_tokens=2)
        httpx.post(f"{url}/v1/completions", json={"model": "nobody's", "prompt": "x"})
    lines = [json.loads(it.message) for it in caplog.records if it.name == "orchestrator.access"]
    good, bad = lines
    assert (good["model"], good["version"], good["status"], good["route"]) == (
        "story",
        1,
        200,
        "/v1/completions",
    )
    assert good["completion_tokens"] >= 1 and good["seconds"] > 0 and good["peer"] == "127.0.0.1"
    assert (bad["status"], bad["model"], bad["error"]) == (404, None, "model_not_found")
    assert "private" not in caplog.text and "nobody" not in caplog.text
