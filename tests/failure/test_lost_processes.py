"""Searches of which one process gets SIGKILL end as undisturbed ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray_state import actors
from small_jobs import Finished, close, run_search, search_runs, write_job

from orchestrator.tuning.reports import Report

pytestmark = [
    pytest.mark.failure,
    pytest.mark.long,
    pytest.mark.timeout(900),
]  # each test runs several whole searches


class Killer:
    """Kills an actor of a class at the first report of a step."""

    def __init__(self, named: str, step: int = 8) -> None:
        self.named = named
        self.step = step
        self.killed: list[int] = []

    def __call__(self, report: Report) -> None:
        if report.step == self.step and not self.killed:
            found = actors(self.named)
            assert found, " ".join(sorted(info["ActorClassName"] for info in actors().values()))
            pid = next(iter(found.values()))["Pid"]
            self.killed.append(pid)
            os.kill(pid, signal.SIGKILL)


def without_workers(search: Finished) -> list[dict[str, object]]:
    return [{**trial, "workers": None} for trial in search.document["trials"]]


def states(folder: Path) -> list[str]:
    return [run.info.status for run in search_runs(f"sqlite:///{folder}/mlflow.db")]


@pytest.mark.parametrize(
    "lost",
    [
        "Broker",
        "TrainController",
        "with_resources.<locals>.ResourceTrainable",
    ],
)
def test_a_search_survives(
    lost: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search survives the loss of the broker, of Train's controller or of a Tune relay.

    Trials, result and version are those of an undisturbed search. No process, placement group or
    running MLflow run remains.
    """
    monkeypatch.chdir(tmp_path)
    killer = Killer(lost)
    disturbed = run_search(finished.job_file, killer)
    assert killer.killed
    assert close(without_workers(disturbed), without_workers(finished))
    assert close(disturbed.document["best"], finished.document["best"])
    assert {"name": "tiny", "version": 1, "alias": "champion"}.items() <= disturbed.document[
        "model"
    ].items()
    assert ("going on from what was kept" in disturbed.said) == ("Trainable" not in lost)
    assert disturbed.left_behind == set()
    assert states(tmp_path) == ["FINISHED"] * 9


@pytest.mark.parametrize(("searcher", "scheduler"), [("optuna", "asha"), ("random", "pbt")])
def test_what_a_search_remembers_survives(
    searcher: str,
    scheduler: str,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proposals and copies that follow from earlier trials survive the loss of the broker.

    The search ends as an undisturbed one.
    """
    (tmp_path / "disturbed").mkdir()
    changes = {"search__searcher": searcher, "search__scheduler": scheduler, "search__trials": 6}
    job_file = write_job(tmp_path, **changes, resources__trials_per_worker=2)
    found = []
    for folder, killer in [("disturbed", Killer("Broker")), (".", None)]:
        monkeypatch.chdir(tmp_path / folder)
        found.append(run_search(job_file, killer))
    disturbed, undisturbed = found
    assert "going on from what was kept" in disturbed.said
    assert close(without_workers(disturbed), without_workers(undisturbed))
    assert close(disturbed.document["best"], undisturbed.document["best"])
    assert disturbed.left_behind == set()
