"""What a search found: a record a trial, kept as events arrive, and their order by the search's metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.space import TrialSpec
from orchestrator.spec import SearchSpec
from orchestrator.tuning.report import Report

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

    def document(self) -> dict[str, Any]:
        """As ``run --json`` prints it; the metrics are those of the best evaluation, which the prompt is taken from."""
        note = {"note": self.note} if self.note else {}
        return {
            "id": self.id, "status": self.status, "config": self.spec.config(), "steps": self.step,
            "best_step": self.best_step, "metrics": self.metrics, **note,
        }  # fmt: skip


class Outcome:
    """Listens to a study and keeps its records."""

    def __init__(self, search: SearchSpec, trials: Sequence[tuple[str, TrialSpec]]) -> None:
        self.search = search
        self.records = {name: TrialRecord(name, spec) for name, spec in trials}

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        self.records[trial].status = "running"

    def trial_reported(self, trial: str, report: Report) -> None:
        record = self.records[trial]
        record.step, record.best_step, record.metrics = report.step, report.best_step, report.best_metrics
        record.checkpoint = report.checkpoint
        if self.search.metric in report.metrics:
            record.curve.append(report.metrics[self.search.metric])

    def trial_ended(self, trial: str, status: str, note: str) -> None:
        self.records[trial].status, self.records[trial].note = status, note

    def ranking(self) -> list[TrialRecord]:
        """Trials with a result, best first: by the search's metric, then by the loss, then in order."""
        sign = -1.0 if self.search.better == "max" else 1.0
        scored = [record for record in self.records.values() if record.metrics and record.status != "failed"]
        return sorted(
            scored, key=lambda record: (sign * record.metrics[self.search.metric], record.metrics["loss"], record.id)
        )
