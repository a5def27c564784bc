"""Going on with a search: after an interrupt in this process, and after the SIGKILL of a driver of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from ray_state import eventually
from small_jobs import Command, Finished, Recorder, run_search, write_job

from orchestrator.errors import BadInput, Interrupted
from orchestrator.job_file import load_job
from orchestrator.registry import Registry
from orchestrator.resume import resume_search
from orchestrator.run import run_job
from orchestrator.search.folder import SearchFolder
from orchestrator.search.journal import read_history
from orchestrator.search.saved import find_search
from orchestrator.tuning.report import Report


def found(document: dict[str, Any]) -> dict[str, Any]:
    """What a search found, without its name and its times."""
    return {key: document[key] for key in ("status", "trials", "best", "baselines", "model")}


def runs(folder: Path) -> list[Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def histories(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each trial's validation losses as MLflow has them."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return {
        run.data.tags["orchestrator.trial"]: [
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, "validation_loss")
        ]
        for run in runs(folder)
        if "orchestrator.trial" in run.data.tags
    }


def interrupt_at(job_file: Path, trial: str, step: int) -> SearchFolder:
    """Run the job until a trial's report comes, and interrupt it there, in the middle of a round."""

    def interrupt(report: Report) -> None:
        if (report.trial, report.step) == (trial, step):
            raise KeyboardInterrupt

    job = load_job(job_file)
    with pytest.raises(Interrupted) as ended:
        run_job(job, Recorder(job, interrupt))
    assert ended.value.hint == f"orchestrator resume {find_search('latest').id}"
    return find_search("latest")


@dataclass(frozen=True)
class Resumed:
    """A search that was interrupted and has gone on, beside the same one that never was."""

    folder: Path
    interrupted: SearchFolder
    reports: dict[str, list[Report]]
    said: str
    document: dict[str, Any]
    undisturbed: Finished


@pytest.fixture(scope="module")
def resumed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    """Eight trials on fifo, two at a time, interrupted when two are over and two are under way."""
    folder = tmp_path_factory.mktemp("resumed")
    changes = {"search__scheduler": "fifo", "resources__trials_per_worker": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        job_file = write_job(folder, **changes)
        interrupted = interrupt_at(job_file, "t002", 12)
        recorders: list[Recorder] = []

        def progress(job: Any) -> Recorder:
            recorders.append(Recorder(job))
            return recorders[0]

        document, _ = resume_search("latest", progress)
        undisturbed = tmp_path_factory.mktemp("undisturbed")
        patch.chdir(undisturbed)
        other = run_search(job_file)
        yield Resumed(folder, interrupted, recorders[0].reports, recorders[0].said.getvalue(), document, other)


def test_a_resumed_search_ends_as_an_undisturbed_one(resumed: Resumed) -> None:
    """fifo: trials, metrics, best, baselines and version are to the last digit those of a search never interrupted."""
    assert found(resumed.document) == found(resumed.undisturbed.document)
    assert resumed.document["search"] == resumed.interrupted.id


def test_nothing_is_done_twice(resumed: Resumed) -> None:
    """Trials that were over do not run again, those under way go on from the end of a round, baselines are kept."""
    steps = {trial: [report.step for report in reports] for trial, reports in resumed.reports.items()}
    assert not {"t000", "t001"} & steps.keys()
    assert steps["t002"] == steps["t003"] == [12, 16]
    assert steps["t004"] == [4, 8, 12, 16]
    assert "without a prompt" not in resumed.said
    assert f"going on with search {resumed.interrupted.id}: 2 of 8 trials are over" in resumed.said


def test_mlflow_shows_one_search(resumed: Resumed) -> None:
    """One parent and a child a trial, all ended, each with every report once, as without the interrupt."""
    assert {run.info.status for run in runs(resumed.folder)} == {"FINISHED"}
    assert len(runs(resumed.folder)) == 9
    assert histories(resumed.folder) == histories(resumed.undisturbed.folder)


def test_a_finished_search_gives_its_document_again(
    resumed: Resumed, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an id's beginning: exit code 0, the same document, and no second version."""
    monkeypatch.chdir(resumed.folder)
    said = command("resume", "tiny-", "--json")
    assert said.code == 0 and said.document == resumed.document
    assert "is finished" in said.err
    assert [it.version for it in Registry().versions("tiny")] == [1]
