"""What a search found: a record a trial, kept as events arrive, and their order by the search's metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.tuning.reports import Copied, Costs, Report

Metrics = dict[str, float]


@dataclass
class TrialRecord:
    """A trial so far. ``status``: waiting, running, finished, stopped (by the scheduler), failed (diverged, or
    broken)."""

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
    """Worker groups that trained it, in their order: more than one where one was lost."""
    slot: str = ""
    """Where it is trained, or was last: group and place in it, as ``w0:2``."""
    costs: Costs = field(default_factory=Costs)

    @property
    def inherited(self) -> bool:
        """Whether its best evaluation is that of a trial that it copied."""
        return bool(self.copied) and self.best_step <= self.copied[-1].step

    def document(self) -> dict[str, Any]:
        """As ``run --json`` prints it; the metrics are those of the best evaluation, which the prompt is taken from."""
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
    """Listens to a study and keeps its records: of the trials known beforehand, and of those that start."""

    def __init__(self, search: SearchSpec, trials: Sequence[tuple[str, TrialSpec]]) -> None:
        self.search = search
        self.records = {name: TrialRecord(name, spec) for name, spec in trials}
        self.places: dict[str, dict[str, str]] = {}
        """Where each worker group was that trained a trial, also of those that are gone: node and device."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        if (
            trial not in self.records
        ):  # proposed while the search runs; starts may come in another order than numbers
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
        """The validation metrics of a trial and of those with as many steps that differ in their seed alone: how many,
        mean and standard deviation (of a sample). Empty when there is no other."""
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
        """Trials with a result, best first: by the search's metric, then by the loss, then in order.

        A trial that copied another's best prompt and found no better one is left out beside the one that it has it
        from: it is the same prompt.
        """
        sign = -1.0 if self.search.better == "max" else 1.0
        scored = [
            record
            for record in self.records.values()
            if record.metrics and record.status != "failed"
        ]
        found = [record.metrics for record in scored if not record.inherited]
        scored = [record for record in scored if not (record.inherited and record.metrics in found)]
        return sorted(
            scored,
            key=lambda record: (
                sign * record.metrics[self.search.metric],
                record.metrics["loss"],
                record.id,
            ),
        )
