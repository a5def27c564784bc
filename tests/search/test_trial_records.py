"""What listeners get at a trial's end, and what the trial's MLflow run then contains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from small_jobs import small_job

from orchestrator.job.space import TrialSpec, trials
from orchestrator.registry import Registry
from orchestrator.search.state.events import Ended, Reported, Started
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import Outcome, TrialStatus
from orchestrator.search.study.study import _Relay, _Targets
from orchestrator.search.tracking import MlflowMirror
from orchestrator.tuning.reports import Copied, Ending, Report

NOTE = "training ran out of memory and went on with forwards of at most 64 tokens"


class Told:
    """A listener that writes every event to MLflow at once."""

    def __init__(self, mirror: MlflowMirror) -> None:
        self.mirror = mirror

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        self.mirror.write([Started(trial, spec)])

    def trial_reported(self, trial: str, report: Report) -> None:
        self.mirror.write([Reported(report)])

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None:
        self.mirror.write([Ended(trial, status, note)])


def report(step: int, ending: Ending | None, note: str) -> Report:
    metrics = {} if ending == "no_room" else {"accuracy": 0.5, "loss": 1.0}
    return Report("t000", step, metrics, 1.0, step, metrics, 0.5, b"", ending, note)


def test_a_resumed_copy_is_logged_with_its_own_learning_rate(tmp_path: Path) -> None:
    """A copy keeps its learning rate in MLflow when a resumed search starts it again."""
    job = small_job(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = trials(job.search)[0]
    copied = Copied("t001", 4, replace(first, learning_rate=0.25))
    history = History(
        [Started("t000", first), Reported(replace(report(8, None, ""), copied=copied))]
    )
    registry = Registry(uri, cache_dir=tmp_path / "cache")
    with registry.start_search(job.name, {}, {}, spill=tmp_path / "spill.jsonl") as log:
        mirror = MlflowMirror(log, copying=True)
        mirror.restore(history)
        mirror.write([Started("t000", first), Reported(report(12, None, ""))])
    points = mlflow.MlflowClient(uri).get_metric_history(log.run_ids["t000"], "learning_rate")
    assert [(point.step, point.value) for point in points] == [(8, 0.25), (12, 0.25)]


@pytest.mark.parametrize(
    ("ending", "status", "note"),
    [
        ("steps", "finished", f"steps; {NOTE}"),
        (None, "stopped", f"by the scheduler; {NOTE}"),
        ("no_room", "failed", f"out of memory at step 8; {NOTE}"),
    ],
)
def test_memory_that_ran_out_is_on_the_trials_record(
    tmp_path: Path, ending: Ending | None, status: str, note: str
) -> None:
    """A trial's record and MLflow run name the lack of memory, however the trial ends.

    A trial for which no memory was left has failed.
    """
    job = small_job(tmp_path)
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path / "cache")
    broker: Any = SimpleNamespace(decide=SimpleNamespace(remote=lambda *decision: None))
    spec = trials(job.search)[0]
    trial = SimpleNamespace(trial_id="x", config={"trial": {"number": 0, "spec": spec}})
    outcome = Outcome([("t000", spec)])
    with registry.start_search(job.name, {}, {}, spill=tmp_path / "spill.jsonl") as log:
        relay = _Relay(broker, [outcome, Told(MlflowMirror(log))], _Targets(job), ["t000"])
        relay.on_trial_start(0, [], trial)
        for one in (report(4, None, ""), report(8, ending, NOTE)):
            relay.on_trial_result(0, [], trial, {"report": one, "done": one.ending is not None})
        relay.on_trial_complete(0, [], trial)
    record = outcome.records["t000"]
    assert (record.status, record.note) == (status, note)
    tags = (
        mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        .get_run(log.run_ids["t000"])
        .data.tags
    )
    assert (tags["orchestrator.memory"], tags["orchestrator.state"]) == (NOTE, status)
    assert tags.get("orchestrator.error") == (note if status == "failed" else None)
