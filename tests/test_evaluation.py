"""Evaluations of registered prompts on other data, votes, and comparisons of two versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from models import load
from small_jobs import Command, Finished

from orchestrator.artifact import PromptArtifact
from orchestrator.cli.pages.comparison import shift_page
from orchestrator.cli.workbench.domain_shift import Question, evaluate_models, majority
from orchestrator.cli.workbench.inspect import nearest_tokens
from orchestrator.errors import BadInput
from orchestrator.models.nearest_words import nearest_words
from orchestrator.models.source import resolve_model
from orchestrator.registry import Registry
from orchestrator.registry.aliases.gate import EVALUATION_TAG
from orchestrator.registry.versions.outcomes import read_outcomes
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import prompt_tensors


@pytest.fixture(scope="module")
def several(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A copy of the search's store with its version and two more, whose prompts have noise."""
    store = tmp_path_factory.mktemp("several") / "mlflow.db"
    shutil.copyfile(finished.folder / "mlflow.db", store)
    registry = Registry(f"sqlite:///{store}", cache_dir=store.parent / "cache")
    artifact = PromptArtifact.load(registry.fetch("tiny", 1))
    folder = tmp_path_factory.mktemp("moved")
    for seed in (1, 2):
        noise = (
            np.random.default_rng(seed)
            .normal(size=artifact.weights.shape, scale=0.5)
            .astype(np.float32)
        )
        config = artifact.manifest.config | {"seed": seed}
        manifest = artifact.manifest.model_copy(
            update={"config": config, "metrics": {"test": {"loss": 5.0}}}
        )
        moved = PromptArtifact(artifact.weights + noise, manifest).save(folder / str(seed))
        registry.register(moved, "several", finished.document["mlflow"]["run_id"], metric="loss")
    return registry


def rows_with_sources(finished: Finished, folder: Path) -> Path:
    """Write the test rows with a source each, and with the text column renamed."""
    file = folder / "elsewhere.jsonl"
    rows = [json.loads(line) for line in (finished.folder / "test.jsonl").read_text().splitlines()]
    changed = [
        {"sentence": row["text"], "label": row["label"], "source": "ab"[place % 2]}
        for place, row in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return file


def test_on_its_own_test_rows_a_prompt_does_what_the_search_measured(
    finished: Finished, several: Registry
) -> None:
    """Metrics equal the search's, within the tolerance of batching, and show no drop."""
    question = Question(str(finished.folder / "test.jsonl"))
    document = evaluate_models(several, ["tiny:1"], [question], log=False)
    (target,) = document["targets"]
    assert target["metrics"][0] == pytest.approx(
        finished.document["best"]["metrics"]["test"], rel=1e-4
    )
    assert target["drop"] == pytest.approx([0.0], abs=1e-4) and target["rows"] == 16


def test_an_evaluation_on_the_test_rows_lets_the_gate_test_the_difference(
    finished: Finished, several: Registry
) -> None:
    """Versions without outcomes get them from ``evaluate`` on the rows of their test split.

    The search itself has stored those of its version, and they are the same.
    """
    name, run_id = "untested", finished.document["mlflow"]["run_id"]
    artifact = several.fetch("tiny", 1)
    for _ in range(2):
        several.register(artifact, name, run_id, metric="loss")
    several.promote(name, 1)
    with pytest.raises(BadInput, match="the confidence is unknown"):
        several.promote(name, 2)
    question = Question(str(finished.folder / "test.jsonl"))
    assert evaluate_models(several, [f"{name}:1", f"{name}:2"], [question])["logged"]
    with pytest.raises(BadInput, match=r"p = 1 \(paired bootstrap\).*, 16 rows"):
        several.promote(name, 2)
    fingerprint = several.version(f"{name}:1").manifest.data.test_fingerprint
    own, later = (
        read_outcomes(several._store, several.resolve(model), fingerprint)
        for model in ("tiny:1", f"{name}:2")
    )
    assert own is not None and later is not None and own.rows == 16
    assert (own.columns["given"] == later.columns["given"]).all()
    assert own.columns["nll"] == pytest.approx(later.columns["nll"], rel=1e-4)


def test_versions_share_forwards_groups_add_up_and_votes_are_counted(
    finished: Finished, several: Registry, tmp_path: Path
) -> None:
    """Versions evaluated together score as alone; groups add up; votes are majorities."""
    models = ["tiny:1", "several:1", "several:2"]
    question = Question(
        str(rows_with_sources(finished, tmp_path)), by="source", rename={"sentence": "text"}
    )
    document = evaluate_models(several, models, [question], ensemble=True, log=False)
    whole, *parts = document["targets"]
    assert [part["group"] for part in parts] == ["a", "b"] and whole["rows"] == sum(
        part["rows"] for part in parts
    )
    for place, model in enumerate(models):
        alone = evaluate_models(several, [model], [question], log=False)["targets"]
        assert [it["metrics"][0] for it in alone] == [
            pytest.approx(it["metrics"][place]) for it in document["targets"]
        ]
        mean = (
            sum(part["metrics"][place]["accuracy"] * part["rows"] for part in parts) / whole["rows"]
        )
        assert mean == pytest.approx(whole["metrics"][place]["accuracy"])
    backbone = load(Path(finished.job.base_model.id))
    names = [model.split(":") for model in models]
    offline = [
        OfflineModel.from_artifact(several.fetch(name, int(number)), backbone)
        for name, number in names
    ]
    rows = [json.loads(line) for line in (tmp_path / "elsewhere.jsonl").read_text().splitlines()]
    said = [one.classify([row["sentence"] for row in rows]) for one in offline]
    votes = [
        majority([{0: it[row]["probs"]["0"], 1: it[row]["probs"]["1"]} for it in said], (0, 1))
        for row in range(16)
    ]
    right = [vote == row["label"] for vote, row in zip(votes, rows, strict=True)]
    assert whole["ensemble"]["accuracy"] == pytest.approx(sum(right) / 16)
    assert parts[0]["ensemble"]["accuracy"] == pytest.approx(sum(right[::2]) / 8)


def test_a_tie_goes_to_the_likelier_label() -> None:
    assert majority([{"a": 0.9, "b": 0.1}, {"a": 0.4, "b": 0.6}], ["a", "b"]) == "a"
    assert majority([{"a": 0.6, "b": 0.4}, {"a": 0.1, "b": 0.9}], ["a", "b"]) == "b"
    assert (
        majority([{"a": 0.99, "b": 0.01}, {"a": 0.4, "b": 0.6}, {"a": 0.4, "b": 0.6}], ["a", "b"])
        == "b"
    )


def test_what_was_found_is_kept_with_the_version(
    finished: Finished,
    several: Registry,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation is kept as a run and as tags, and the promotion gate uses it.

    The run's metrics are linked to the logged model; the tags are on the version.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_URI", several.tracking_uri)
    file = rows_with_sources(finished, tmp_path)
    arguments = ["--data", file, "--by", "source", "--rename", "sentence=text"]
    said = command("evaluate", "several:1", "several:2", *arguments)
    assert said.code == 0, said.err
    assert "own test split" in said.out and "source a" in said.out and "several:2" in said.out
    summary = several.resolve("several:1")
    documents = [
        json.loads(text) for key, text in summary.tags.items() if key.startswith(EVALUATION_TAG)
    ]
    assert sorted(it["group"] for it in documents) == ["", "source=a", "source=b"]
    label = f"{tmp_path.name}.elsewhere"
    assert f"evaluated.{label[:150]}" in summary.tags
    client = mlflow.MlflowClient(several.tracking_uri)
    run = client.get_run(documents[0]["run_id"])
    assert run.info.status == "FINISHED" and f"{label}/loss" in run.data.metrics
    assert run.inputs.model_inputs[0].model_id in client.get_model_version_download_uri(
        "several", "1"
    )
    several.promote("several", 1)
    better = several.resolve("several:2")
    losses = [
        json.loads(it.tags[f"{EVALUATION_TAG}{documents[0]['fingerprint']}"])["metrics"]["loss"]
        for it in (summary, better)
    ]
    assert losses[0] != losses[1]


REFUSED = {
    "no such column": (["--rename", "sentence=txt"], "'text'"),
    "no such file": (["--data", "nosuch.jsonl"], "does not exist"),
    "not a pair": (["--rename", "sentence"], "OLD=NEW"),
    "other labels": (
        ["--rename", "sentence=text", "--target", "source"],
        "holds 'a', 'b'; tiny:1 answers 0, 1",
    ),
    "one voter": (["--rename", "sentence=text", "--ensemble"], "one version can't vote"),
    "many groups": (["--rename", "sentence=text", "--by", "nosuch"], "nosuch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_with_the_reason(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(finished.folder)
    arguments, reason = REFUSED[case]
    file = rows_with_sources(finished, tmp_path)
    given = arguments if "--data" in arguments else ["--data", file, *arguments]
    said = command("evaluate", "tiny:1", *given)
    assert said.code == 2 and reason in said.err


def test_versions_are_compared_by_the_metric_that_is_asked_for(
    finished: Finished, several: Registry
) -> None:
    """--metric chooses among all metrics of labels, or names a function of the user's own.

    The document has precision, recall, F1 and support of each label, which give the accuracy.
    """
    question = Question(str(finished.folder / "test.jsonl"))

    def evaluated(models: list[str], metric: str | None = None) -> dict[str, Any]:
        return evaluate_models(several, models, [question], log=False, metric=metric)

    usual = evaluated(["tiny:1"])
    assert usual["metric"] == "loss"  # its search ranked by it
    (target,) = usual["targets"]
    ((no, yes),) = target["classes"]
    assert (no["label"], yes["label"], no["support"] + yes["support"]) == (0, 1, 16)
    right = no["recall"] * no["support"] + yes["recall"] * yes["support"]
    assert right / 16 == pytest.approx(target["metrics"][0]["accuracy"])
    assert (no["f1"] + yes["f1"]) / 2 == pytest.approx(target["metrics"][0]["macro_f1"])
    (heading,) = [line for line in shift_page(usual) if line.startswith("labels of tiny:1")]
    assert heading.split()[3:] == ["precision", "recall", "f1", "rows"]
    twice = usual | {"targets": [target, target]}
    assert not any(line.startswith("labels of") for line in shift_page(twice))
    chosen = evaluated(["tiny:1"], "mcc")
    assert chosen["metric"] == "mcc" and chosen["targets"][0]["drop"] == pytest.approx(
        [0], abs=1e-6
    )
    own = evaluated(["tiny:1"], "own_metrics:cost")["targets"][0]
    assert own["metrics"][0]["own_metrics:cost"] == round(16 - right) and own["drop"] == [None]


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("zzz", "metric 'zzz' is unknown"),
        ("bleu", "--metric bleu judges texts, and tiny:1 gives labels"),
        ("own_metrics:missing", "--metric: own_metrics:missing can't be imported"),
    ],
)
def test_a_metric_that_a_version_lacks_is_refused(
    finished: Finished, several: Registry, metric: str, reason: str
) -> None:
    """The base model is not loaded for it."""
    said: list[str] = []
    question = Question(str(finished.folder / "test.jsonl"))
    with pytest.raises(BadInput, match=re.escape(reason)):
        evaluate_models(several, ["tiny:1"], [question], log=False, say=said.append, metric=metric)
    assert not said


def test_an_area_is_refused_on_rows_that_lack_a_label(
    finished: Finished, several: Registry, tmp_path: Path
) -> None:
    """Rows of one label have no ROC AUC; asked for nothing, evaluate leaves it out."""
    rows = (finished.folder / "test.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "one-label.jsonl"
    file.write_text("".join(row for row in rows if '"label": 1' in row))
    with pytest.raises(BadInput, match="no row of label 0"):
        evaluate_models(several, ["tiny:1"], [Question(str(file))], log=False, metric="roc_auc")
    document = evaluate_models(several, ["tiny:1"], [Question(str(file))], log=False)
    metrics = document["targets"][0]["metrics"][0]
    assert "roc_auc" not in metrics and {"macro_f1", "ece", "mcc"} <= set(metrics)


def test_two_versions_side_by_side(
    finished: Finished, several: Registry, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences come first; metrics, evaluations and nearest words are next to each other."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", several.tracking_uri)
    said = command("compare", "tiny:1", "several:1", "--json")
    assert said.code == 0 and said.document["versions"] == ["tiny:1", "several:1"]
    apart = {name for name, (one, other) in said.document["facts"].items() if one != other}
    assert set(said.document["differs"]) == apart and "template" not in apart
    assert (
        len(said.document["nearest"][0]) == said.document["facts"]["config.num_virtual_tokens"][0]
    )
    text = command("compare", "tiny:1", "several:1").out
    assert "what differs" in text and "nearest words of token" in text
    assert "nothing differs" in command("compare", "tiny:1", "tiny:1").out
    assert command("compare", "tiny:1", "tiny:9").code == 2


def test_nearest_words_are_those_of_the_loaded_model(finished: Finished, several: Registry) -> None:
    """Nearest words read from the table on disk equal those of the loaded model."""
    artifact = PromptArtifact.load(several.fetch("tiny", 1))
    embeddings = prompt_tensors(artifact).embeddings
    assert embeddings is not None
    wanted = nearest_tokens(load(Path(finished.job.base_model.id)), embeddings, 3)
    found = nearest_words(resolve_model(finished.job.base_model), artifact.weights, 3)
    assert [[word for word, _ in row] for row in found] == [
        [it.token for it in row] for row in wanted
    ]
    assert found[0][0][1] == pytest.approx(wanted[0][0].distance, abs=1e-4)
    assert nearest_words(resolve_model(finished.job.base_model), artifact.weights[:, :7], 3) == []


PLAIN = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tiny/1")
print(json.dumps(model.predict([{"text": text} for text in json.loads(sys.argv[2])])))
"""


def test_plain_mlflow_answers_as_we_do(finished: Finished, several: Registry) -> None:
    """A process with only MLflow, pickle forbidden, gives our engine's labels and probabilities."""
    texts = ["great movie", "is this spam or ham", "a quick brown fox jumps"]
    environment: dict[str, Any] = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    answer = subprocess.run(
        [sys.executable, "-c", PLAIN, finished.tracking_uri, json.dumps(texts)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    found = json.loads(answer.stdout.splitlines()[-1])
    ours = OfflineModel.from_artifact(several.fetch("tiny", 1)).classify(texts)
    assert [row["label"] for row in found] == [row["label"] for row in ours]
    for one, other in zip(found, ours, strict=True):
        assert one["probs"] == pytest.approx(other["probs"], rel=1e-6)


@pytest.mark.slow
def test_mlflows_own_server_answers_as_we_do(finished: Finished, several: Registry) -> None:
    """``mlflow models serve``, pickle forbidden, gives the same answers over HTTP."""
    texts = ["great movie", "is this spam or ham"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/tiny/1",
        "--env-manager",
        "local",
    ]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": finished.tracking_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    log = (finished.folder / "models-serve.log").open("w+b")
    process = subprocess.Popen(
        [*argv, "--port", str(port)],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        found = asked(
            f"http://127.0.0.1:{port}/invocations",
            {"dataframe_records": [{"text": it} for it in texts]},
        )
    except TimeoutError:
        pytest.fail((finished.folder / "models-serve.log").read_text()[-3000:])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
    ours = OfflineModel.from_artifact(several.fetch("tiny", 1)).classify(texts)
    assert [row["label"] for row in found["predictions"]] == [row["label"] for row in ours]
    for one, other in zip(found["predictions"], ours, strict=True):
        assert one["probs"] == pytest.approx(other["probs"], rel=1e-6)


def asked(url: str, document: Any) -> Any:
    """Return the answer of a server that may still be starting."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        request = urllib.request.Request(
            url, json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            time.sleep(0.3)
    raise TimeoutError
