"""The trials of a search: their states, a record of what is known about each, their ranking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import mean, stdev
from typing import Any

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.tuning.reports import Copied, Costs, Report

Metrics = dict[str, float]


def trial_id(number: int) -> str:
    return f"t{number:03d}"


def trial_number(name: str) -> int:
    return int(name[1:])


class TrialStatus(StrEnum):
    """The state of a trial, with the value that documents, journals and MLflow's tags hold."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    """Ended by itself: after its last step, or without a better result for ``train.patience``."""
    STOPPED = "stopped"
    """Ended by the scheduler, or with the search."""
    FAILED = "failed"
    """Diverged, ran out of memory, or broke."""

    @property
    def is_over(self) -> bool:
        return self not in (TrialStatus.WAITING, TrialStatus.RUNNING)


@dataclass
class TrialRecord:
    """Everything that is known about a trial so far."""

    id: str
    spec: TrialSpec
    """The current configuration, which is another one after the trial copied another."""
    status: TrialStatus = TrialStatus.WAITING
    note: str = ""
    step: int = 0
    best_step: int = 0
    metrics: Metrics = field(default_factory=dict)
    """Validation metrics of the best evaluation; empty before the first."""
    own_score: float | None = None
    """As in ``Report``."""
    checkpoint: bytes | None = None
    """The newest checkpoint; None before the first report."""
    points: list[tuple[int, Metrics]] = field(default_factory=list)
    """Validation metrics at each evaluated step."""
    copied: list[Copied] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    """Worker groups that trained the trial, in order. There are several if a group was lost."""
    slot: str = ""
    """Group and slot in which the trial is trained, or was last, such as ``w0:2``."""
    costs: Costs = field(default_factory=Costs)

    def add(self, report: Report) -> None:
        """Bring the record up to date with the trial's next report."""
        self.step, self.best_step = report.step, report.best_step
        self.metrics, self.own_score = report.best_metrics, report.own_score
        self.checkpoint = report.checkpoint
        self.costs = self.costs.plus(report.costs)
        # A trial whose checkpoint was lost begins again, and reports the same steps again.
        while self.points and self.points[-1][0] >= report.step:
            self.points.pop()
        self.points.append((report.step, report.metrics))
        if report.worker and report.worker not in self.workers[-1:]:
            self.workers.append(report.worker)
        self.slot = f"{report.worker}:{report.slot}" if report.worker else ""
        if report.copied is not None:
            self.spec = report.copied.spec
            self.copied.append(report.copied)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps at which the metric was evaluated, with its values."""
        return [(step, metrics[metric]) for step, metrics in self.points if metric in metrics]

    @property
    def inherited(self) -> bool:
        """Tell whether the best evaluation comes from a trial that this one copied."""
        return bool(self.copied) and self.best_step <= self.copied[-1].step

    def document(self) -> dict[str, Any]:
        """Return the record as ``run --json`` prints it.

        The metrics are those of the best evaluation, from which the prompt is taken.
        """
        note: dict[str, Any] = {"note": self.note} if self.note else {}
        if self.spec.confirms:
            note["confirms"] = self.spec.confirms
        if self.copied:
            note["copied"] = [
                {"trial": one.source, "step": one.step, "learning_rate": one.spec.learning_rate}
                for one in self.copied
            ]
        return {
            "id": self.id, "status": self.status, "config": self.spec.config(), "steps": self.step,
            "best_step": self.best_step, "metrics": self.metrics, "workers": self.workers, **note,
        }  # fmt: skip


class Outcome:
    """A study's listener that keeps a record of each trial, known beforehand or started later."""

    def __init__(self, trials: Iterable[tuple[str, TrialSpec]] = ()) -> None:
        self.records = {name: TrialRecord(name, spec) for name, spec in trials}
        self.places: dict[str, dict[str, str]] = {}
        """Node and device of each worker group that trained a trial, including groups that are
        gone."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        if trial not in self.records:
            self._add(trial, spec)
        self.records[trial].status = TrialStatus.RUNNING

    def _add(self, trial: str, spec: TrialSpec) -> None:
        """Add a trial, in the order of the trials' numbers, in which they need not start."""
        last = next(reversed(self.records), "")
        self.records[trial] = TrialRecord(trial, spec)
        if _place(trial) < _place(last):
            self.records = {name: self.records[name] for name in sorted(self.records, key=_place)}

    def trial_reported(self, trial: str, report: Report) -> None:
        self.records[trial].add(report)
        if report.place:
            self.places[report.worker] = report.place

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None:
        # A trial that was not known beforehand and never started has no record.
        if record := self.records.get(trial):
            record.status, record.note = status, note

    def over_seeds(self, best: TrialRecord) -> dict[str, Any]:
        """Return validation metrics over the trials that differ from ``best`` in the seed alone.

        Only trials with as many steps count, ``best`` among them. The result has their number,
        their seeds, and mean and standard deviation (of a sample) of each metric. It is empty when
        there is no other trial.
        """
        wanted = replace(best.spec, seed=0), best.step
        sound = [
            record
            for record in self.records.values()
            if record.metrics and record.status != TrialStatus.FAILED
        ]
        same = [record for record in sound if (replace(record.spec, seed=0), record.step) == wanted]
        if len(same) < 2:
            return {}
        found = [record.metrics for record in same]
        spread = {
            name: {"mean": mean(values), "std": stdev(values)}
            for name in best.metrics
            if len(values := [metrics[name] for metrics in found if name in metrics]) > 1
        }
        seeds = sorted(record.spec.seed for record in same)
        return {"trials": len(same), "seeds": seeds, "validation": spread}

    def ranking(self, search: SearchSpec) -> list[TrialRecord]:
        """Return the trials with a result, best first; see ``ranked``."""
        return ranked(self.records.values(), search)


def _place(trial: str) -> tuple[int, str]:
    """Return the key that sorts the ids of trials by their numbers."""
    return len(trial), trial


def ranked(trials: Iterable[TrialRecord], search: SearchSpec) -> list[TrialRecord]:
    """Sort the trials with a result, best first: by the metric, then the loss, then the id.

    Failed trials are left out, and those that confirm others. So is a trial that copied another
    trial's best prompt and found no better one, if the source is in the ranking: both have the same
    prompt.
    """
    sign = -1.0 if search.better == "max" else 1.0
    scored = [
        trial
        for trial in trials
        if search.metric in trial.metrics
        and trial.status != TrialStatus.FAILED
        and not trial.spec.confirms
    ]
    own_results = [trial.metrics for trial in scored if not trial.inherited]

    def is_ranked(trial: TrialRecord) -> bool:
        return not trial.inherited or trial.metrics not in own_results

    def key(trial: TrialRecord) -> tuple[float, float, str]:
        metrics = trial.metrics
        return sign * metrics[search.metric], metrics.get("loss", 0.0), trial.id

    return sorted(filter(is_ranked, scored), key=key)
