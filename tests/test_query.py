"""``orchestrator query`` against a real HTTP server with three prompts of a tiny random model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import uvicorn
from models import load, model_folder
from ray_state import eventually
from serving.conftest import SPAM, TREC, MemoryRegistry, save_artifact
from small_jobs import Command

from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.serving.client import ask
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.access import Access, load_keys
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.store import PromptStore

KEY = "a-key"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, backbone = tmp_path_factory.mktemp("prompts"), load(model_folder())
    return {
        "spam": save_artifact(folder / "spam", backbone, verbalizer=SPAM),
        "trec": save_artifact(
            folder / "trec", backbone, verbalizer=TREC, template="Q: {question} about {topic}\nA:"
        ),
        "story": save_artifact(folder / "story", backbone, template="{text}"),
    }


@pytest.fixture(scope="module")
def url(prompts: dict[str, Path]) -> Iterator[str]:
    registry = MemoryRegistry()
    for name, folder in prompts.items():
        registry.add(name, 1, folder, "champion")
    backbone = load(model_folder())
    store = PromptStore(backbone, registry)
    store.refresh()
    engine = ServingEngine(backbone)
    service = PromptService(store, engine)
    api = make_api(service, Access(load_keys({"ORCHESTRATOR_API_KEYS": KEY})))
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert eventually(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    service.close()
    engine.close()


def test_a_label_and_its_probability(url: str, prompts: dict[str, Path]) -> None:
    """The likeliest label comes first, then all probabilities, as in the offline model's answer."""
    expected = OfflineModel.from_artifact(prompts["spam"]).classify(["win a prize"])[0]
    answer = ask(url, "spam", "win a prize", KEY)
    label = answer.document["data"][0]["label"]
    assert label == expected["label"]
    assert answer.text.startswith(f"{label}   ({label} ")
    assert answer.document["data"][0]["probs"] == pytest.approx(
        {str(key): value for key, value in expected["probs"].items()}, abs=1e-5
    )


@pytest.mark.parametrize(
    "model", ["spam", "spam@champion", "spam:1", "models:/spam@champion", "models:/spam/1"]
)
def test_every_way_to_name_a_model(url: str, model: str) -> None:
    """A name, an alias, a version and MLflow's own form give the same answer."""
    assert ask(url, model, "hello", KEY).text == ask(url, "spam", "hello", KEY).text


def test_a_row_with_several_columns(url: str) -> None:
    """A JSON object fills the template's columns; for a plain text the error names them."""
    answer = ask(url, "trec", json.dumps({"question": "who", "topic": "foxes"}), KEY)
    assert answer.document["data"][0]["label"] in TREC
    with pytest.raises(BadInput, match="'question', 'topic'"):
        ask(url, "trec", "who", KEY)
    with pytest.raises(BadInput, match="topic"):
        ask(url, "trec", '{"question": "who"}', KEY)


def test_a_prompt_without_labels_completes(url: str, prompts: dict[str, Path]) -> None:
    """Without labels the answer is generated text."""
    expected = OfflineModel.from_artifact(prompts["story"]).complete(["the fox"])[0]
    assert ask(url, "story", "the fox", KEY).text == expected.text.strip()


def test_a_text_in_braces_that_is_no_json(url: str) -> None:
    """A text in braces that is not JSON is sent as text."""
    assert ask(url, "spam", "{not json", KEY).document["data"][0]["label"] in SPAM


def test_an_unknown_model(url: str) -> None:
    """The server's own message is shown, with the nearest name."""
    with pytest.raises(BadInput, match=r"spma.*did you mean 'spam'"):
        ask(url, "spma", "hello", KEY)


@pytest.mark.parametrize("key", [None, "wrong", "schlüssel-☃"])
def test_a_wrong_key(url: str, key: str | None) -> None:
    """The error names the variable that holds the key."""
    with pytest.raises(BadInput) as refused:
        ask(url, "spam", "hello", key)
    assert "ORCHESTRATOR_API_KEY" in str(refused.value)


def test_the_command_prints_the_answer(
    url: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output has only the answer, or with --json the server's whole document."""
    monkeypatch.setenv("ORCHESTRATOR_API_KEY", KEY)
    said = command("query", "spam", "hello", "--url", url)
    assert (said.code, said.err) == (0, "") and len(said.out.splitlines()) == 1
    assert command("query", "spam", "hello", "--url", url, "--json").document["model"] == "spam"
    refused = command("query", "spma", "hello", "--url", url)
    assert refused.code == 2 and "'spma'" in refused.err and "next: " in refused.err


@contextmanager
def stranger(status: int, body: str) -> Iterator[str]:
    """A server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (200, "<html>hello</html>", Unreachable, "is not an orchestrator's"),
        (200, "[1]", Unreachable, "is not an orchestrator's"),
        (404, "<html>no</html>", BadInput, "HTTP 404"),
        (500, '{"error": "boom"}', JobFailed, "HTTP 500"),
    ],
)
def test_somebody_elses_server(
    status: int, body: str, error: type[Exception], message: str
) -> None:
    """Answers of another server are told apart from our own refusals and cause no crash."""
    with stranger(status, body) as address, pytest.raises(error, match=message):
        ask(address, "spam", "hello")
