"""The front: a request is repeated on another replica only if its answer has not begun."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope
from test_serving_routes import Client, error_of

from orchestrator.serving.deploy.replica import MAX_TRIES, Front, Replica
from orchestrator.serving.http.access import ApiKey, load_keys
from orchestrator.serving.http.service import PromptService

BODY = {"model": "story", "prompt": "the fox", "max_tokens": 6, "temperature": 0}


class Died(Exception):
    """The error of a replica that is gone."""


class Busy(Exception):
    """The error for too many requests that wait for a replica."""


class Replicas:
    """Replicas of one application, the first few of which die after some messages."""

    def __init__(self, api: Any, dying: int, after: int, error: type[Exception] = Died) -> None:
        self._replica: Any = object.__new__(Replica)
        self._replica.api = api
        self._dying, self._after, self._error = dying, after, error
        self.asked = 0

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        self.asked += 1
        dies, told = self.asked <= self._dying, 0
        if dies and not self._after:
            raise self._error
        async for message in self._replica.answer(scope, body):
            yield message
            told += 1
            if dies and told == self._after:
                raise self._error


@pytest.fixture
def client(service: PromptService) -> Client:
    return Client(service)


class FrontClient(Client):
    def __init__(self, replicas: Replicas, keys: tuple[ApiKey, ...] = ()) -> None:
        self.api: Any = Front(replicas.answer, keys, 20_000, Died, Busy).pass_on


def test_a_request_passes_through(client: Client) -> None:
    """Plain answers, streams, refusals and headers are the replica's own."""
    front, direct = FrontClient(Replicas(client.api, 0, 0)), client
    for body in (BODY, {**BODY, "model": "none"}, {**BODY, "temperature": 9}):
        one, other = front.post("/v1/completions", body), direct.post("/v1/completions", body)
        assert one.status_code == other.status_code and one.headers["x-request-id"]
        assert one.json().get("choices") == other.json().get("choices")
        assert one.json().get("error") == other.json().get("error")
    streamed = front.post("/v1/completions", {**BODY, "stream": True})
    pieces = [
        json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")
    ]
    whole = direct.post("/v1/completions", BODY).json()["choices"][0]["text"]
    assert "".join(one["choices"][0]["text"] for one in pieces) == whole
    assert front.get("/v1/models").json() == direct.get("/v1/models").json()
    assert error_of(front.post("/classify", b" " * 30_000))["code"] == "body_too_large"


def test_a_request_of_a_dead_replica_is_asked_again(client: Client) -> None:
    """A request is repeated while nothing was sent; if all replicas die, it gets 503."""
    replicas = Replicas(client.api, MAX_TRIES - 1, 0)
    assert FrontClient(replicas).post("/v1/completions", BODY).status_code == 200
    assert replicas.asked == MAX_TRIES
    answer = FrontClient(Replicas(client.api, MAX_TRIES, 0)).post("/v1/completions", BODY)
    assert (answer.status_code, answer.headers["retry-after"], error_of(answer)["code"]) == (
        503,
        "5",
        "unavailable",
    )


def test_an_answer_that_began_is_not_asked_again(client: Client) -> None:
    """An answer that began is not repeated: the client would get some of it twice."""
    replicas = Replicas(client.api, 1, 2)
    with pytest.raises((httpx.HTTPError, Died, AssertionError)):
        assert (
            "[DONE]" in FrontClient(replicas).post("/v1/completions", {**BODY, "stream": True}).text
        )
    assert replicas.asked == 1


def test_too_many_requests_for_replicas(client: Client) -> None:
    """Serve's own refusal has OpenAI's shape."""
    answer = FrontClient(Replicas(client.api, 1, 0, Busy)).post("/v1/completions", BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert error_of(answer)["code"] == "server_overloaded"


def test_nobody_without_a_key_gets_past_the_front(client: Client) -> None:
    """The front refuses before it reads the body or asks a replica.

    It leaves a key's rate to the replicas.
    """
    replicas = Replicas(client.api, 0, 0)
    (key,) = load_keys({"ORCHESTRATOR_API_KEYS": "secret"})
    front = FrontClient(replicas, (replace(key, per_minute=1),))
    assert front.post("/v1/completions", b" " * 30_000).status_code == 401
    assert replicas.asked == 0
    for _ in range(3):
        answer = front.post("/v1/completions", BODY, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
    assert front.get("/health").status_code == 200


def test_the_server_s_own_life_cycle(client: Client) -> None:
    """Startup and shutdown messages are completed: else Serve starts no replica."""
    asked, said = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive() -> Message:
        return asked.pop(0)

    async def send(message: Message) -> None:
        said.append(message["type"])

    for api in (FrontClient(Replicas(client.api, 0, 0)).api, client.api):
        asked[:] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        asyncio.run(api({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"] * 2
