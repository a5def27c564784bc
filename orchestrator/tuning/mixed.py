"""The engine of a search that mixes methods: an engine for each method on one backbone.

Trials of one prompt method train packed, as in a search of that method alone. A baseline changes
the model, so its trials train one after another. A trial's numbers are those of its method's own
engine: they do not depend on trials of other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import PROMPT_METHODS
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.engine import Engine
from orchestrator.tuning.meter import Meter
from orchestrator.tuning.reports import EvaluationJob, Report
from orchestrator.tuning.worker_group import Group


@dataclass
class Seated:
    """A trial with a seat, and its newest checkpoint."""

    spec: TrialSpec
    checkpoint: bytes | None


class MixedEngine:
    """An engine with ``capacity`` seats for trials of any of its methods.

    A round takes every seated trial to its next evaluation, method by method. Of the trials of
    baselines, only the one at work is in memory if several are seated: the others wait as
    checkpoints, because each may be as large as the model.
    """

    def __init__(self, engines: Mapping[str, Engine], capacity: int) -> None:
        self.capacity = capacity
        self._engines = dict(engines)
        self._seated: dict[str, Seated] = {}

    @property
    def _first(self) -> Engine:
        return next(iter(self._engines.values()))

    @property
    def backbone(self) -> Backbone:
        return self._first.backbone

    @property
    def group(self) -> Group:
        return self._first.group

    @property
    def meter(self) -> Meter:
        return self._first.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        for engine in self._engines.values():
            engine.meter = meter

    def seat(self, trial: str, spec: TrialSpec, checkpoint: bytes | None = None) -> None:
        """Give a trial a seat, starting afresh or from a checkpoint.

        Raises RuntimeError when all seats are taken.
        """
        if len(self._seated) >= self.capacity:
            raise RuntimeError(f"no slot is free for trial {trial}: {self.capacity} are taken")
        self._seated[trial] = Seated(spec, checkpoint)
        if spec.method in PROMPT_METHODS:
            self._engines[spec.method].seat(trial, spec, checkpoint)

    def free(self, trial: str) -> None:
        """Take a trial's seat away; unknown trials are ignored, as in ``Engine``."""
        if seated := self._seated.pop(trial, None):
            self._engines[seated.spec.method].free(trial)

    def round(self) -> list[Report]:
        """Train every seated trial up to its next evaluation, and report.

        A trial whose report has an ending leaves its seat.
        """
        reports = [report for method in self._engines for report in self._method_round(method)]
        for report in reports:
            self._seated[report.trial].checkpoint = report.checkpoint
            if report.ending:
                self.free(report.trial)
        return reports

    def _method_round(self, method: str) -> list[Report]:
        trials = [trial for trial, seated in self._seated.items() if seated.spec.method == method]
        if method not in PROMPT_METHODS:
            return [report for trial in trials for report in self._alone(method, trial)]
        if not trials:
            return []
        self._engines[method].measure_afresh()
        return self._engines[method].round()

    def _alone(self, method: str, trial: str) -> list[Report]:
        """Take a trial of a baseline to its next evaluation, with the model to itself."""
        engine, seated = self._engines[method], self._seated[trial]
        if trial not in engine.slots:
            engine.seat(trial, seated.spec, seated.checkpoint)
        engine.measure_afresh()
        reports = engine.round()
        waiting = [each for each in self._seated.values() if each.spec.method not in PROMPT_METHODS]
        if len(waiting) > 1:
            engine.free(trial)
        return reports

    def evaluate(self, job: EvaluationJob) -> dict[str, float]:
        """Return the metrics of a trial's result or of a text on a whole split."""
        engine = self._first if job.spec is None else self._engines[job.spec.method]
        return engine.evaluate(job)
