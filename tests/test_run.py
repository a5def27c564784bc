"""A whole job, from spec to registered model, on a real Ray and a real MLflow store."""

from __future__ import annotations

import json
import os
from html import unescape
from pathlib import Path
from typing import Any

import jsonschema
import mlflow
import pytest
import torch
from mlflow.entities import Run
from models import load, model_folder
from small_jobs import Command, Finished, Said

import orchestrator.search.prepare
from orchestrator.artifact import PromptArtifact
from orchestrator.cli.pages.search import run_summary
from orchestrator.job.metrics import names_of
from orchestrator.job.space import TrialSpec, trials
from orchestrator.registry import Registry
from orchestrator.search.prepare import Prepared, prepare
from orchestrator.serving.offline import OfflineModel
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine


def record(**fields: Any) -> dict[str, Any]:
    """Return the JSON schema of an object with exactly these required fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


NUMBER, TEXT, COUNT = (
    {"type": "number"},
    {"type": "string", "minLength": 1},
    {"type": "integer", "minimum": 0},
)
METRICS = {
    **record(accuracy=NUMBER, exact_match=NUMBER, loss=NUMBER),
    "additionalProperties": False,
}
TEST_METRICS = {
    **record(**dict.fromkeys([*names_of("labels"), *names_of("targets")], NUMBER)),
    "additionalProperties": False,
}
CONFIG = {
    **record(init={}, num_virtual_tokens=COUNT, learning_rate=NUMBER, seed=COUNT),
    "additionalProperties": False,
}
DOCUMENT = record(
    search=TEXT,
    status={"const": "succeeded"},
    trials={
        "type": "array",
        "items": record(
            id=TEXT,
            status={"enum": ["finished", "stopped", "failed"]},
            config=CONFIG,
            steps=COUNT,
            metrics=METRICS,
            workers={"type": "array", "items": TEXT, "minItems": 1},
        ),
    },
    best=record(trial=TEXT, config=CONFIG, metrics=record(validation=METRICS, test=TEST_METRICS)),
    baselines=record(
        zero_shot=record(test=METRICS),
        few_shot=record(test=METRICS, examples={"type": "integer", "minimum": 1, "maximum": 4}),
        instruction=record(test=METRICS, text=TEXT),
    ),
    model=record(name=TEXT, version=COUNT, alias=TEXT),
    mlflow=record(tracking_uri=TEXT, run_id=TEXT),
    workers=record(w0=record(node=TEXT)),
    warnings={"type": "array", "items": TEXT},
    seconds=record(total=NUMBER, startup=NUMBER, training=NUMBER),
)


def client(finished: Finished) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(finished.tracking_uri)


def children(finished: Finished) -> dict[str, Run]:
    parent = finished.document["mlflow"]["run_id"]
    store = client(finished)
    runs = store.search_runs(
        [store.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    return {run.data.tags["orchestrator.trial"]: run for run in runs}


def artifact(finished: Finished, version: int = 1) -> Path:
    registry = Registry(finished.tracking_uri, cache_dir=finished.folder / "cache")
    return registry.fetch("tiny", version)


def test_the_document_has_the_documented_shape(finished: Finished) -> None:
    """``run --json`` has the documented keys, which scripts rely on."""
    jsonschema.validate(finished.document, DOCUMENT)
    assert finished.document["search"].startswith("tiny-")
    assert finished.document["mlflow"]["tracking_uri"] == finished.tracking_uri
    assert finished.document["model"] == {
        "name": "tiny", "version": 1, "alias": "champion",
        "reason": "Version 1 is champion: there was none before.",
    }  # fmt: skip


def test_what_makes_the_result_less_trustworthy_is_said_everywhere(finished: Finished) -> None:
    """The warning about few rows of a class is shown everywhere.

    It is in the document, the progress, the saved search, the page and the run.
    """
    warnings = finished.document["warnings"]
    assert warnings == list(prepare(finished.job).warnings)
    assert warnings[0].startswith("train has 9 rows of class '0'")
    folder = finished.folder / ".orchestrator" / "searches" / finished.document["search"]
    assert json.loads((folder / "search.json").read_text())["warnings"] == warnings
    tags = client(finished).get_run(finished.document["mlflow"]["run_id"]).data.tags
    page = unescape((folder / "report.html").read_text())
    summary = run_summary(finished.document, finished.job)
    for text in warnings:
        assert f"warning: {text}" in finished.said and f"<li>{text}</li>" in page
        assert text in tags["orchestrator.warnings"] and f"warning: {text}" in summary


def test_every_trial_is_there_once_in_order(finished: Finished) -> None:
    """All trials are listed in the spec's order, with their configuration and actual ending."""
    documents = finished.document["trials"]
    assert [document["id"] for document in documents] == [f"t{number:03d}" for number in range(8)]
    assert [document["config"] for document in documents] == [
        spec.config() for spec in trials(finished.job.search)
    ]
    for document in documents:
        last = finished.reports[document["id"]][-1]
        assert document["steps"] == last.step and document["metrics"] == last.best_metrics
        assert document["status"] == (
            "finished" if last.step == finished.job.train.steps else "stopped"
        )
    assert {document["status"] for document in documents} == {
        "finished",
        "stopped",
    }  # ASHA has stopped some


def test_every_second_is_accounted_for(finished: Finished) -> None:
    """The parts add up to the total; startup is the sum of the parts before the trials."""
    seconds = finished.document["seconds"]
    before = sum(seconds[name] for name in ("model", "prepare", "ray", "workers"))
    assert seconds["startup"] == pytest.approx(before, abs=0.01)
    assert seconds["training"] == seconds["trials"] > 0 and seconds["workers"] > 0
    parts = before + sum(seconds[name] for name in ("trials", "test", "registry"))
    assert seconds["total"] == pytest.approx(parts, abs=0.1)


def test_the_best_trial_is_the_best(finished: Finished) -> None:
    """No trial has a better validation metric than the registered one."""
    best = finished.document["best"]
    losses = {
        document["id"]: document["metrics"]["loss"] for document in finished.document["trials"]
    }
    assert best["metrics"]["validation"]["loss"] == losses[best["trial"]] == min(losses.values())


def test_tuning_beats_the_baselines(finished: Finished) -> None:
    """The prompt learns: its validation loss is below both baselines', even on a random model."""
    found = finished.document["best"]["metrics"]["validation"]["loss"]
    assert all(
        found < baseline["validation"]["loss"]
        for baseline in finished.document["baselines"].values()
    )


def test_mlflow_has_one_parent_and_a_child_a_trial(finished: Finished) -> None:
    """The finished parent has the search's results; each child has its trial's real state."""
    parent = client(finished).get_run(finished.document["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["orchestrator.best_trial"] == finished.document["best"]["trial"]
    best, zero_shot = (
        finished.document["best"]["metrics"],
        finished.document["baselines"]["zero_shot"],
    )
    assert parent.data.metrics["best_test_loss"] == pytest.approx(best["test"]["loss"])
    assert parent.data.metrics["zero_shot_test_loss"] == pytest.approx(zero_shot["test"]["loss"])
    assert parent.data.params["scheduler"] == "asha"
    runs = children(finished)
    assert len(runs) == 8
    for document in finished.document["trials"]:
        assert runs[document["id"]].info.status == "FINISHED"
        assert runs[document["id"]].data.tags["orchestrator.state"] == document["status"]


def test_a_child_has_its_parameters_and_its_history_on_our_own_steps(finished: Finished) -> None:
    """The history's axis is optimiser steps, so that charts of several trials line up."""
    for trial, run in children(finished).items():
        reports = finished.reports[trial]
        config = next(
            document["config"]
            for document in finished.document["trials"]
            if document["id"] == trial
        )
        assert run.data.params["learning_rate"] == str(config["learning_rate"])
        assert run.data.params["num_virtual_tokens"] == str(config["num_virtual_tokens"])
        assert run.data.params["init"] == (
            "text" if isinstance(config["init"], dict) else config["init"]
        )
        history = client(finished).get_metric_history(run.info.run_id, "validation_loss")
        assert [(point.step, point.value) for point in history] == [
            (r.step, r.metrics["loss"]) for r in reports
        ]
        assert [r.step for r in reports] == list(range(4, 4 * len(reports) + 1, 4))


def test_the_registered_weights_are_the_best_checkpoints(finished: Finished) -> None:
    """The registered prompt is the best trial's at its best evaluation, bit for bit."""
    checkpoint = Checkpoint.from_bytes(
        finished.reports[finished.document["best"]["trial"]][-1].checkpoint
    )
    registered = PromptArtifact.load(artifact(finished))
    assert torch.equal(torch.from_numpy(registered.weights), checkpoint.best()["prompt"])
    assert registered.manifest.steps == checkpoint.best_step
    assert registered.manifest.metrics["test"] == finished.document["best"]["metrics"]["test"]
    assert registered.manifest.trial == finished.document["best"]["trial"]


def test_the_offline_model_answers_as_the_search_measured(finished: Finished) -> None:
    """The registered artifact reaches the document's test accuracy on the test rows."""
    rows = prepare(finished.job).rows.test
    model = OfflineModel.from_artifact(artifact(finished), load(model_folder()))
    answers = model.classify([{"text": row["text"]} for row in rows])
    right = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == finished.document["best"]["metrics"]["test"]["accuracy"]


def test_a_packed_search_equals_its_trial_alone(finished: Finished) -> None:
    """The best trial, run alone without Ray, has the same prompt and metrics as in the search."""
    best = finished.document["best"]
    prepared = prepare(finished.job)
    engine = Engine(
        load(model_folder()), prepared.task, finished.job.train, finished.job.search, capacity=1
    )
    engine.seat("alone", TrialSpec.from_config(best["config"]))
    reports = []
    while engine.slots:
        reports += engine.round()
    packed = finished.reports[best["trial"]]
    for one, other in zip(reports, packed, strict=False):  # the packed one may have been stopped
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
    mine = Checkpoint.from_bytes(reports[len(packed) - 1].checkpoint).prompt()["prompt"]
    theirs = Checkpoint.from_bytes(packed[-1].checkpoint).prompt()["prompt"]
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_nothing_of_a_search_stays_in_ray(finished: Finished) -> None:
    """No actor and no placement group outlives the search."""
    assert finished.left_behind == set()


def test_progress_tells_the_search_in_plain_lines(finished: Finished) -> None:
    """Without a terminal there is one whole line per report and per stop."""
    lines = finished.said.splitlines()
    assert lines[0] == "reading data and base model ..."
    assert sum(" step " in line for line in lines) == sum(map(len, finished.reports.values()))
    assert any(line.startswith("8 trials in ") for line in lines)
    assert "without a prompt: validation loss" in finished.said
    assert "with the written instruction: validation loss" in finished.said
    assert "\x1b" not in finished.said


@pytest.fixture(scope="module")
def noisy() -> Any:
    """``prepare`` in an environment whose libraries print to standard output."""

    def prepare_noisily(*arguments: Any, **options: Any) -> Prepared:
        print("a library greets you")
        os.write(1, b"and another, from C\n")
        return prepare(*arguments, **options)

    return prepare_noisily


def test_the_same_spec_gives_the_same_search_and_only_its_document_on_stdout(
    finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch, noisy: Any
) -> None:
    """A second run by command line repeats trials, metrics and best to the last digit.

    ``--json`` keeps standard output for the one document, whatever libraries print. The second
    version is as good as the first but not better, so it becomes challenger and the champion stays.
    """
    monkeypatch.chdir(finished.folder)
    monkeypatch.setattr(orchestrator.search.prepare, "prepare", noisy)
    said: Said = command("run", finished.job_file, "--json")
    assert said.code == 0, said.err
    jsonschema.validate(said.document, DOCUMENT)
    assert said.document["trials"] == finished.document["trials"]
    assert said.document["best"] == finished.document["best"]
    assert said.document["baselines"] == finished.document["baselines"]
    model = said.document["model"]
    confidence, reason = model.pop("confidence"), model.pop("reason")
    assert model == {"name": "tiny", "version": 2, "alias": "challenger"}
    assert "p = 1 (paired bootstrap)" in reason and "16 rows" in reason and reason in said.err
    assert (confidence["p_value"], confidence["significant"]) == (1.0, False)
    assert "a library greets you" in said.err and "and another, from C" in said.err
    assert Registry(finished.tracking_uri).aliases("tiny") == {"champion": 1, "challenger": 2}
    first, second = (PromptArtifact.load(artifact(finished, version)).weights for version in (1, 2))
    assert (first == second).all()
