"""The application on Ray Serve: a real server, a real registry, the official client."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from load import Load

from orchestrator.errors import BadInput, Unreachable
from orchestrator.models.backbone import Backbone
from orchestrator.registry import Registry
from orchestrator.serving.app import Server, build_app, check_address, choose_base_model, start
from orchestrator.serving.deploy.options import ServeOptions
from orchestrator.serving.engine.generation import Sampling
from orchestrator.serving.offline import OfflineModel

KEY = "test-key"
SPAM = {0: " ham", 1: " spam"}
LINES = ["the quick brown fox", "win a prize"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def prompts(
    tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, write_artifact: Any
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "spam": write_artifact(folder / "spam", backbone, verbalizer=SPAM),
        "spam-2": write_artifact(folder / "spam-2", backbone, verbalizer=SPAM, tokens=9, seed=3),
        "story": write_artifact(folder / "story", backbone, tokens=7, seed=2, template="{text}"),
        "story-2": write_artifact(
            folder / "story-2", backbone, tokens=5, seed=8, template="{text}"
        ),
    }


@pytest.fixture(scope="module")
def mlflow_registry(tmp_path_factory: pytest.TempPathFactory, prompts: dict[str, Path]) -> Registry:
    folder = tmp_path_factory.mktemp("mlflow")
    registry = Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache")
    with registry.start_search("serving", {}, {}) as search:
        registry.register(prompts["story"], "story", search.run_id)
        registry.register(prompts["story-2"], "story", search.run_id)
        registry.set_alias("story", "champion", 1)
        registry.register(prompts["spam"], "spam", search.run_id)
        registry.set_alias("spam", "champion", 1)
        registry.register(prompts["spam-2"], "spam", search.run_id)
    return registry


@pytest.fixture(scope="module")
def server(mlflow_registry: Registry, ray_cluster: None) -> Iterator[Server]:
    os.environ["ORCHESTRATOR_API_KEYS"] = KEY
    try:
        server = start(ServeOptions(port=free_port(), cpus=1, poll_seconds=0.2), mlflow_registry)
    finally:
        del os.environ["ORCHESTRATOR_API_KEYS"]
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_openai_client(client: openai.OpenAI, backbone: Backbone, prompts: dict[str, Path]) -> None:
    """The official client lists models, and completions are the offline model's."""
    assert sorted(model.id for model in client.models.list()) == ["spam", "story"]
    assert client.models.retrieve("spam").owned_by == "orchestrator"
    made = client.completions.create(
        model="story", prompt=["a", "the fox"], temperature=0, max_tokens=8
    )
    expected = OfflineModel.from_artifact(prompts["story"], backbone).complete(["a", "the fox"])
    assert [choice.text for choice in made.choices] == [
        row.text[: len(choice.text)] for choice, row in zip(made.choices, expected, strict=True)
    ]
    assert made.usage is not None and made.usage.completion_tokens <= 16


def test_openai_errors(client: openai.OpenAI, server: Server) -> None:
    """Each refusal raises the client's own error class."""
    with pytest.raises(openai.NotFoundError, match="did you mean 'story'"):
        client.completions.create(model="stori", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="story", prompt="x" * 2000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/metrics").status_code == 401


def classify(server: Server, model: str, texts: list[str]) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{server.url}/classify", json={"model": model, "input": texts}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def test_served_equals_offline_and_follows_the_champion(
    server: Server, backbone: Backbone, prompts: dict[str, Path], mlflow_registry: Registry
) -> None:
    """Answers are the offline model's before and after the alias moves, without a restart."""
    texts = ["win a prize", "the quick brown fox"]
    for version, name in ((1, "spam"), (2, "spam-2")):
        mlflow_registry.set_alias("spam", "champion", version)
        expected = OfflineModel.from_artifact(prompts[name], backbone).classify(texts)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            rows = classify(server, "spam", texts)
            if rows[0]["probs"] == pytest.approx(
                {str(k): v for k, v in expected[0]["probs"].items()}, abs=1e-5
            ):
                break
        for row, want in zip(rows, expected, strict=True):
            assert row["probs"] == pytest.approx(want["probs"], abs=1e-5)
            assert row["label"] == want["label"]


def test_a_stream_through_serve(client: openai.OpenAI) -> None:
    """Chunks add up to the plain answer, in completions and in chat."""
    asked: dict[str, Any] = {"model": "story", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, prompt="the fox").choices[0].text
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(**asked, prompt="the fox", stream=True)
    ]
    assert "".join(pieces) == whole and len(pieces) > 2
    messages: Any = [{"role": "user", "content": "the fox"}]
    chat = client.chat.completions.create(**asked, messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == whole


def test_aliases_and_canaries_move_under_load(
    server: Server, backbone: Backbone, prompts: dict[str, Path], mlflow_registry: Registry
) -> None:
    """No request fails while the champion and a canary come and go.

    Every answer is wholly of the version that it names.
    """
    story = [prompts["story"], prompts["story-2"]]
    texts = {
        f"story:{version}": [
            one.text
            for one in OfflineModel.from_artifact(folder, backbone).complete(
                LINES, Sampling(6, 0.0)
            )
        ]
        for version, folder in enumerate(story, 1)
    }
    assert texts["story:1"] != texts["story:2"]
    with Load(
        server.url, KEY, {"model": "story", "prompt": LINES, "max_tokens": 6, "temperature": 0}
    ) as load:
        load.until(lambda seen: seen["story:1"] > 5)
        mlflow_registry.set_alias("story", "champion", 2)
        load.until(lambda seen: seen["story:2"] > 5)
        mlflow_registry.set_alias("story", "champion", 1)
        mlflow_registry.set_alias("story", "challenger", 2)
        load.until(lambda seen: set(seen) == {"story:1"}, newest=30)
        mlflow_registry.set_canary("story", "challenger", 50)
        load.until(lambda seen: min(seen["story:1"], seen["story:2"]) > 5, newest=30)
        mlflow_registry.end_canary("story")
        load.until(lambda seen: set(seen) == {"story:1"}, newest=30)
    assert load.failed == []
    for version, made in load.answers:
        assert made == texts[version]


def test_a_taken_port_is_refused_before_anything_starts(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the port, and Ray is not started."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(Unreachable, match=str(port)):
            start(ServeOptions(port=port), registry)


def test_an_open_address_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that other machines can reach needs keys."""
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        with pytest.raises(BadInput, match="no API keys"):
            check_address(ServeOptions(host=host, port=free_port()))
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", KEY)
    check_address(ServeOptions(host="0.0.0.0", port=free_port()))


def test_haproxy_needs_keys(monkeypatch: pytest.MonkeyPatch, registry: Any) -> None:
    """HAProxy makes replicas listen on all interfaces, whatever the host option says."""
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    for attempt in (
        lambda: start(ServeOptions(port=free_port()), registry),
        lambda: build_app(ServeOptions()),
    ):
        with pytest.raises(BadInput, match="RAY_SERVE_ENABLE_HA_PROXY=1 lets other machines"):
            attempt()


def test_the_base_model_comes_from_the_prompts(
    registry: Any, make_artifact: Any, backbone: Backbone, other_backbone: Backbone
) -> None:
    """All served prompts share one base model.

    An empty registry and two base models are refused with the next step.
    """
    assert choose_base_model(ServeOptions(), registry).id == backbone.info.id
    registry.add("other", 1, make_artifact("other", on=other_backbone, verbalizer=SPAM), "champion")
    with pytest.raises(BadInput, match="different base models"):
        choose_base_model(ServeOptions(), registry)
    assert choose_base_model(ServeOptions(models=("other",)), registry).id == other_backbone.info.id
    assert (
        choose_base_model(ServeOptions(models=("spam:1", "story@champion")), registry).id
        == backbone.info.id
    )
    with pytest.raises(BadInput, match="did you mean 'spam'"):
        choose_base_model(ServeOptions(models=("sapm",)), registry)
    registry.aliases = {}
    with pytest.raises(BadInput) as nothing:
        choose_base_model(ServeOptions(), registry)
    assert "orchestrator init" in nothing.value.hint
