"""User errors at the command line: each gets one clear message and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from models import model_folder, train_tokenizer
from small_jobs import Command, Said, write_job
from tokenizers import normalizers
from transformers import BertConfig, ViTConfig


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is taken but does not listen, so that no other program can listen on it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty MLflow store for all tests of this file, because creating its schema is slow."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder; no search, run, experiment or model may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    monkeypatch.undo()
    assert not (tmp_path / ".orchestrator").exists()
    client = mlflow.MlflowClient(store)
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert client.search_runs(["0"]) == []
    assert client.search_registered_models() == []


def refused(said: Said, code: int, *named: str) -> None:
    """Check the exit code and the single message, and that standard output is empty.

    The message must name the value and the next step.
    """
    assert said.code == code, said.err
    assert said.out == ""
    for text in named:
        assert text in said.err, said.err
    messages = [line for line in said.err.splitlines() if not line.startswith("  next: ")]
    assert len(messages) == 1, said.err
    assert "  next: " in said.err or messages[0].endswith(")")  # a spec's problem includes its hint


# The job spec


def test_a_missing_job_file(command: Command) -> None:
    """The error names the path and a file that was probably meant."""
    refused(command("run", "nope.yaml", "-q"), 2, "nope.yaml", "no such file")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("search.trails=3", ["search.trails", "did you mean trials"]),
        (
            "search.space.learning_rate=-1",
            ["search.space.learning_rate", "-1", "a number above 0 and at most 1000"],
        ),
        ("method=magic", ["method", "magic", "prompt_tuning"]),
        ("search.metric=speed", ["search.metric", "speed", "accuracy"]),
    ],
)
def test_a_bad_key_or_value(
    command: Command, tmp_path: Path, override: str, named: list[str]
) -> None:
    """The error names the key, the value and the allowed values."""
    said = command("run", write_job(tmp_path), "--set", override, "-q")
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert all(text in said.err for text in named), said.err


# Data


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__verbalizer": {0: " no"}}, ["data.verbalizer", "label 1"]),
        ({"data__target": "lable"}, ["data.target", "'lable'", "text"]),
        ({"data__template": "{body}?"}, ["data.template", "'body'"]),
        ({"data__path": {"train": "missing.jsonl"}}, ["data.path.train", "missing.jsonl"]),
        ({"resources__cpus_per_worker": 999}, ["999 CPUs"]),
        (
            {"data__max_input_tokens": 2000, "data__template": "{text}" + " spam" * 200},
            ["context of 160", "5 virtual"],
        ),
        (
            {"data__max_input_tokens": 150, "data__template": "{text}" + " spam" * 200},
            ["the template alone takes"],
        ),
    ],
)
def test_a_job_that_does_not_fit_its_data_or_model(
    command: Command, tmp_path: Path, ray_cluster: None, changes: dict[str, Any], named: list[str]
) -> None:
    """Labels, columns, files, resources and context are checked before the search starts."""
    refused(command("run", write_job(tmp_path, **changes), "-q"), 2, *named)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split(command: Command, tmp_path: Path, split: str) -> None:
    """The error names the split whose file has no rows."""
    job = write_job(tmp_path)
    (tmp_path / f"{split}.jsonl").write_text("")
    refused(command("run", job, "-q"), 2, f"the {split} split is empty")


def test_an_init_text_without_tokens(command: Command, tmp_path: Path) -> None:
    """A text without any token in the tokenizer can't start a prompt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().iterdir():
        os.link(file, folder / file.name) if "tokenizer" not in file.name else None
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(folder)
    job = write_job(tmp_path, base_model__id=str(folder), search__space__init={"text": "   "})
    refused(command("run", job, "-q"), 2, "init text '   ' has no tokens")


# The base model


CLASSIFIER = BertConfig(architectures=["BertForSequenceClassification"])


IMAGES = ViTConfig(architectures=["ViTForImageClassification"])


@pytest.mark.parametrize("config", [IMAGES, CLASSIFIER], ids=["vit", "bert"])
def test_a_base_model_that_is_no_language_model(
    command: Command, tmp_path: Path, config: Any
) -> None:
    """The error names the folder, the kind of model in it, and the kinds that are allowed."""
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    said = command("run", write_job(tmp_path, base_model__id=str(folder)), "-q")
    refused(said, 2, str(folder), "not a language model", config.model_type)


def test_a_missing_model_folder(command: Command, tmp_path: Path) -> None:
    """A path that does not exist is not mistaken for a hub id."""
    said = command("run", write_job(tmp_path, base_model__id="./no/such/model"), "-q")
    refused(said, 2, "./no/such/model", "does not exist")


def test_a_model_without_weights(command: Command, tmp_path: Path) -> None:
    """A folder without safetensors is refused before a search begins."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().glob("*.json"):
        os.link(file, folder / file.name)
    said = command("run", write_job(tmp_path, base_model__id=str(folder)), "-q")
    refused(said, 2, str(folder), "safetensors")


def test_a_hub_model_without_network(command: Command, tmp_path: Path) -> None:
    """Offline, a hub id that is not in the cache counts as unreachable, not as wrong."""
    said = command("run", write_job(tmp_path, base_model__id="nobody/no-such-model"), "-q")
    refused(said, 3, "'nobody/no-such-model'", "HF_HUB_OFFLINE")


def test_a_hub_data_set_without_network(command: Command, tmp_path: Path) -> None:
    """Offline, a hub data set that is not in the cache counts as unreachable, too."""
    said = command("run", write_job(tmp_path, data__path="nobody/no-such-data"), "-q")
    refused(said, 3, "'nobody/no-such-data'", "HF_HUB_OFFLINE")


# Services that must answer


def test_a_registry_that_does_not_answer(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_port: int
) -> None:
    """The error names the address and how to start a server; so does the --json document."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{dead_port}")
    job = write_job(tmp_path)
    refused(command("run", job, "-q"), 3, f"127.0.0.1:{dead_port}", "mlflow server")
    said = command("run", job, "-q", "--json")
    assert said.code == 3
    assert said.document["status"] == "failed"
    assert said.document["error"]["exit_code"] == 3
    assert str(dead_port) in said.document["error"]["message"] and said.document["error"]["next"]


@pytest.mark.parametrize(
    "uri", ["nonsense", "ftp://host/x", "http://host:port", "./mlruns", "sqlite:///"]
)
def test_a_nonsensical_tracking_uri(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """A nonsensical URI is refused, with an example of a valid address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused(command("run", write_job(tmp_path), "-q"), 2, "tracking URI", uri)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_port: int, scheme: str
) -> None:
    """An unreachable cluster is reported soon; Ray itself would retry for minutes and then exit."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was asked"))
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{dead_port}")
    refused(command("run", write_job(tmp_path), "-q"), 3, f"127.0.0.1:{dead_port}", "RAY_ADDRESS")


def test_something_else_listens_at_the_clusters_address(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that accepts connections but never answers is reported as no cluster."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("orchestrator.cluster.session.ANSWER_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        refused(
            command("run", write_job(tmp_path), "-q", "--address", address), 3, address, "not Ray"
        )


# The registry's verbs


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["models", "spma"], "spma"),
        (["models", "spma:3"], "spma"),
        (["models", "spma@champion"], "spma"),
        (["models", "a@b@"], "a@b@"),
        (["promote", "spma", "1"], "spma"),
        (["promote", "spma", "1", "--alias", "v2"], "v2"),
        (["rollback", "spma"], "spma"),
        (["serve"], "no prompt is registered"),
        (["serve", "spma"], "spma"),
    ],
)
def test_what_is_not_registered(command: Command, words: list[str], named: str) -> None:
    """The error repeats the name as typed and says how to get a model."""
    said = command(*words)
    assert said.code == 2 and said.out == ""
    assert named in said.err and "Traceback" not in said.err


def test_a_listing_of_nothing_says_where_to_begin(command: Command) -> None:
    """Listing an empty registry is no error and says where to begin."""
    said = command("models")
    assert said.code == 0 and "next: orchestrator demo" in said.out
    assert command("models", "--json").document == []


@pytest.mark.parametrize(
    "words",
    [["run"], ["nonsense"], ["promote", "x", "y"], ["models", "--nope"], ["serve", "--port", "0"]],
)
def test_a_command_line_that_makes_no_sense(command: Command, words: list[str]) -> None:
    """Wrong usage is bad input and shows the verb's usage; with --json it is a document."""
    said = command(*words)
    assert said.code == 2 and said.out == ""
    assert "Usage: orchestrator" in said.err and "--help" in said.err
    assert command(*words, "--json").document["error"]["exit_code"] == 2


# Serving


def test_a_taken_port(command: Command) -> None:
    """A taken port counts as unreachable; the message names the port and the option."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        said = command("serve", "--port", port)
    assert said.code == 3 and str(port) in said.err and "--port" in said.err


def test_an_open_host_without_keys(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that other machines can reach needs API keys."""
    monkeypatch.delenv("ORCHESTRATOR_API_KEYS", raising=False)
    said = command("serve", "--host", "0.0.0.0")
    assert said.code == 2 and "no API keys" in said.err and "ORCHESTRATOR_API_KEYS" in said.err


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "ftp://x", "http://[", "http://a b"]
)
def test_a_question_to_nobody(command: Command, dead_port: int, url: str) -> None:
    """Without a server at the URL, the error names the address and how to start a server."""
    address = url.format(port=dead_port)
    refused(command("query", "spam", "hello", "--url", address), 3, address, "orchestrator serve")


def test_unforeseen_errors_are_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the program prints no traceback and asks for a report."""

    def broken(*_: Any, **__: Any) -> Callable[..., Any]:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr("orchestrator.search.inputs.load_checked", broken)
    said = command("validate", write_job(tmp_path))
    refused(said, 1, "please report it", "ZeroDivisionError: division by zero")
    assert (
        json.loads(command("validate", tmp_path / "job.yaml", "--json").out)["error"]["exit_code"]
        == 1
    )
