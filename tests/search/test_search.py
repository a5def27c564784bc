"""Searches with failures, and the other schedulers, on a real Ray with a tiny random model."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from models import model_folder
from ray_state import actors
from small_jobs import Finished, close, run_search, search_runs, write_job

import orchestrator.search.prepare
from orchestrator.artifact import PromptArtifact
from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.job.spec import SearchSpec, SpaceSpec, TrainSpec
from orchestrator.registry import Registry
from orchestrator.search.prepare import Prepared, prepare
from orchestrator.search.study.study import scheduler
from orchestrator.search.workers.running import worker_failure
from orchestrator.search.workers.train_group import RESTARTS
from orchestrator.search.workers.worker import load_failure
from orchestrator.tuning.reports import Report


def statuses(finished: Finished) -> dict[str, str]:
    return {document["id"]: document["status"] for document in finished.document["trials"]}


def mlflow_states(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the (MLflow status, our state) of the parent and child runs in a folder's store."""
    found: dict[str, list[tuple[str, str]]] = {"parents": [], "children": []}
    for run in search_runs(f"sqlite:///{folder}/mlflow.db"):
        kind = "children" if "mlflow.parentRunId" in run.data.tags else "parents"
        found[kind].append((run.info.status, run.data.tags["orchestrator.state"]))
    return found


@pytest.mark.long
def test_a_search_survives_the_death_of_its_worker(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL of the worker every trial ends with the metrics of the undisturbed search."""
    monkeypatch.chdir(tmp_path)
    killed: list[int] = []

    def kill_once(report: Report) -> None:
        if report.step == 8 and not killed:
            (worker,) = actors("RayTrainWorker").values()
            killed.append(worker["Pid"])
            os.kill(worker["Pid"], signal.SIGKILL)

    disturbed = run_search(finished.job_file, kill_once)
    assert killed
    assert close(disturbed.document["trials"], finished.document["trials"])
    assert close(disturbed.document["best"], finished.document["best"])
    assert {"name": "tiny", "version": 1, "alias": "champion"}.items() <= disturbed.document[
        "model"
    ].items()
    assert disturbed.left_behind == set()


@pytest.mark.long
def test_a_worker_that_cannot_load_its_model_fails_the_job(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are damaged after the checks give one clear error.

    The parent run is FAILED, no child is running, and nothing is registered.
    """
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)

    def prepare_then_damage(*arguments: Any, **options: Any) -> Prepared:
        prepared = prepare(*arguments, **options)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        return prepared

    monkeypatch.setattr(orchestrator.search.prepare, "prepare", prepare_then_damage)
    with pytest.raises(JobFailed, match="weights") as failed:
        run_search(write_job(tmp_path, base_model__id=str(model)))
    assert str(model) in failed.value.message and failed.value.hint
    assert failed.value.exit_code == 1
    states = mlflow_states(tmp_path)
    assert states["parents"] == [("FAILED", "failed")]
    assert all(status == "KILLED" for status, _ in states["children"])
    assert Registry(f"sqlite:///{tmp_path}/mlflow.db").list_models() == []


@pytest.mark.long
def test_a_reached_target_ends_the_search(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """search.stop.metric ends the search after the first good enough trial, which is registered.

    The scheduler is the median rule. Trials that were interrupted or never began count as stopped.
    """
    monkeypatch.chdir(tmp_path)
    target = finished.reports["t000"][1].metrics["loss"] + 1e-3
    search = run_search(
        write_job(
            tmp_path,
            search__stop={"metric": target},
            search__scheduler="median",
            resources__trials_per_worker=2,
        )
    )
    assert search.document["best"]["trial"] == "t000"
    assert search.document["best"]["metrics"]["validation"]["loss"] <= target
    assert statuses(search) == {f"t{number:03d}": "stopped" for number in range(8)}
    assert search.document["trials"][0]["steps"] == 8
    assert (
        search.document["trials"][7]["steps"] == 0 and search.document["trials"][7]["metrics"] == {}
    )
    states = mlflow_states(tmp_path)
    assert states["parents"] == [("FINISHED", "finished")]
    assert set(states["children"]) == {("FINISHED", "stopped")}


def test_a_grid_without_a_scheduler(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grid with fifo runs every combination; patience alone ends trials without progress."""
    monkeypatch.chdir(tmp_path)
    space = {
        "init": "sample_vocab",
        "num_virtual_tokens": [2, 3],
        "learning_rate": [1e-12, 0.1],
        "seed": 0,
    }
    search = run_search(
        write_job(
            tmp_path,
            search={"space": space, "searcher": "grid", "scheduler": "fifo", "metric": "loss"},
            train__patience=2,
            resources__trials_per_worker=2,
        )
    )
    documents = search.document["trials"]
    points = [
        (document["config"]["num_virtual_tokens"], document["config"]["learning_rate"])
        for document in documents
    ]
    assert points == [(2, 1e-12), (2, 0.1), (3, 1e-12), (3, 0.1)]
    assert set(statuses(search).values()) == {"finished"}
    stuck = [document for document in documents if document["config"]["learning_rate"] == 1e-12]
    assert all(document["note"] == "patience" and document["steps"] < 16 for document in stuck)
    assert all(document["note"] == "steps" for document in documents if document not in stuck)
    assert (
        "zero_shot" in search.document["baselines"]
        and "instruction" not in search.document["baselines"]
    )


def learning_rates(finished: Finished) -> dict[str, list[tuple[int, float]]]:
    """Return every trial's learning rate by step, as logged to MLflow."""
    client = mlflow.MlflowClient(finished.tracking_uri)
    parent = client.get_run(finished.document["mlflow"]["run_id"])
    children = client.search_runs([parent.info.experiment_id], "tags.`orchestrator.trial` != ''")
    return {
        run.data.tags["orchestrator.trial"]: [
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, "learning_rate")
        ]
        for run in children
    }


@pytest.mark.long
def test_proposed_trials_that_copy_each_other(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """optuna and pbt work together on a real model.

    A copy takes over the source's result at the same step, the document and MLflow record each
    change, and the registered prompt has the length of its configuration.
    """
    monkeypatch.chdir(tmp_path)
    search = run_search(write_job(tmp_path, search__searcher="optuna", search__scheduler="pbt"))
    documents = {document["id"]: document for document in search.document["trials"]}
    assert list(documents) == [f"t{number:03d}" for number in range(8)]
    assert {(document["status"], document["steps"]) for document in documents.values()} == {
        ("finished", 16)
    }
    assert any(document.get("copied") for document in documents.values())
    rates = learning_rates(search)
    for name, document in documents.items():
        assert rates[name][-1] == (16, document["config"]["learning_rate"])
        by_step = dict(rates[name])
        for copied in document.get("copied", []):
            source, step = search.reports[copied["trial"]][copied["step"] // 4 - 1], copied["step"]
            after = search.reports[name][step // 4]
            assert after.score <= source.score < search.reports[name][step // 4 - 1].score  # a loss
            assert by_step[step + 4] == copied["learning_rate"] != by_step[step]
    best = search.document["best"]["config"]
    folder = Registry(search.tracking_uri, cache_dir=tmp_path / "cache").fetch("tiny", 1)
    artifact = PromptArtifact.load(folder)
    assert artifact.manifest.config == best
    assert artifact.tensors["prompt"].shape[0] == best["num_virtual_tokens"]
    assert search.left_behind == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("asha", "AsyncHyperBandScheduler"),
        ("median", "MedianStoppingRule"),
        ("fifo", "FIFOScheduler"),
        ("pbt", "FIFOScheduler"),
    ],
)
def test_the_spec_names_the_scheduler(finished: Finished, name: str, expected: str) -> None:
    """Each name gives Tune's scheduler of that kind, which counts our steps."""
    search = SearchSpec(scheduler=name, space=SpaceSpec(learning_rate=[0.1, 0.3]))  # type: ignore[arg-type]
    job = finished.job.model_copy(update={"search": search, "train": TrainSpec()})
    made = scheduler(job)
    assert type(made).__name__ == expected
    assert getattr(made, "_time_attr", "step") == "step"


def test_a_workers_error_is_told_without_rays_layers() -> None:
    """The message is the last line of the worker's own error, or the error's name without one."""

    group = RuntimeError("a group failed")
    group.worker_failures = {
        0: RuntimeError("Traceback ...\n  File x\nValueError: the matrix is singular")
    }  # type: ignore[attr-defined]
    assert worker_failure(group).message == "a worker failed: ValueError: the matrix is singular"
    assert worker_failure(MemoryError()).message == "a worker failed: MemoryError"
    assert (
        "base_model.id 'm': OSError: disk" in load_failure("m", OSError("disk\nand more")).message
    )
    assert RESTARTS >= 1


def test_a_model_that_can_not_be_used_is_bad_input_from_a_worker_too() -> None:
    """BadInput from a worker keeps exit code 2; any other error while loading is a failure."""
    refused = load_failure("m", BadInput("the weights are not finite", "choose another"))
    assert (refused.exit_code, refused.message, refused.hint) == (
        2,
        "the weights are not finite",
        "choose another",
    )
    assert load_failure("m", Unreachable("the hub is away")).exit_code == 1
