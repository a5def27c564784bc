"""The results of a search: a record per trial, and their ranking by the search's metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.search.state.ranking import ranked
from orchestrator.tuning.reports import Copied, Costs, Report

Metrics = dict[str, float]


@dataclass
class TrialRecord:
    """The state of a trial so far.

    ``status`` is waiting, running, finished, stopped (by the scheduler) or failed (diverged, or
    broken).
    """

    id: str
    spec: TrialSpec
    status: str = "waiting"
    note: str = ""
    step: int = 0
    best_step: int = 0
    metrics: Metrics = field(default_factory=dict)
    checkpoint: bytes | None = None
    curve: list[float] = field(default_factory=list)
    copied: list[Copied] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    """Worker groups that trained the trial, in order. There are several if a group was lost."""
    slot: str = ""
    """Group and slot in which the trial is trained, or was last, such as ``w0:2``."""
    costs: Costs = field(default_factory=Costs)

    @property
    def best_metrics(self) -> Metrics:
        return self.metrics

    @property
    def inherited(self) -> bool:
        """Tell whether the best evaluation comes from a trial that this one copied."""
        return bool(self.copied) and self.best_step <= self.copied[-1].step

    def document(self) -> dict[str, Any]:
        """Return the record as ``run --json`` prints it.

        The metrics are those of the best evaluation, from which the prompt is taken.
        """
        note: dict[str, Any] = {"note": self.note} if self.note else {}
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

    def __init__(self, search: SearchSpec, trials: Sequence[tuple[str, TrialSpec]]) -> None:
        self.search = search
        self.records = {name: TrialRecord(name, spec) for name, spec in trials}
        self.places: dict[str, dict[str, str]] = {}
        """Node and device of each worker group that trained a trial, including groups that are
        gone."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        # A trial that was proposed during the search. Trials may start in another order than their
        # numbers.
        if trial not in self.records:
            self.records[trial] = TrialRecord(trial, spec)
            self.records = {
                name: self.records[name]
                for name in sorted(self.records, key=lambda it: (len(it), it))
            }
        self.records[trial].status = "running"

    def trial_reported(self, trial: str, report: Report) -> None:
        record = self.records[trial]
        record.step, record.best_step, record.metrics = (
            report.step,
            report.best_step,
            report.best_metrics,
        )
        record.checkpoint = report.checkpoint
        record.costs = record.costs.plus(report.costs)
        if report.worker and report.worker not in record.workers[-1:]:
            record.workers.append(report.worker)
        if report.place:
            self.places[report.worker] = report.place
        record.slot = f"{report.worker}:{report.slot}" if report.worker else ""
        if report.copied is not None:
            record.spec = report.copied.spec
            record.copied.append(report.copied)
        if self.search.metric in report.metrics:
            record.curve.append(report.metrics[self.search.metric])

    def trial_ended(self, trial: str, status: str, note: str) -> None:
        self.records[trial].status, self.records[trial].note = status, note

    def over_seeds(self, best: TrialRecord) -> dict[str, Any]:
        """Return validation metrics over the trials that differ from ``best`` in the seed alone.

        Only trials with as many steps count, ``best`` among them. The result has their number, and
        mean and standard deviation (of a sample) of each metric. It is empty when there is no other
        trial.
        """
        wanted = replace(best.spec, seed=0), best.step
        sound = [
            record
            for record in self.records.values()
            if record.metrics and record.status != "failed"
        ]
        same = [
            record.metrics
            for record in sound
            if (replace(record.spec, seed=0), record.step) == wanted
        ]
        if len(same) < 2:
            return {}
        spread = {
            name: {"mean": mean(values), "std": stdev(values)}
            for name in best.metrics
            if len(values := [metrics[name] for metrics in same if name in metrics]) > 1
        }
        return {"trials": len(same), "validation": spread}

    def ranking(self) -> list[TrialRecord]:
        """Return the trials with a result, best first; see ``ranking.ranked``."""
        return ranked(self.records.values(), self.search)
