"""The contents of a report: the job, all trials' reports, the baselines, and the result, if any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.events import Ended, Found, Reported, Started
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.journal import read_events
from orchestrator.search.state.ranking import ranked
from orchestrator.search.state.saved import load_saved
from orchestrator.tuning.reports import Costs


@dataclass
class TrialFacts:
    """A trial: its configuration, validation metrics at each evaluated step, status and costs."""

    id: str
    spec: TrialSpec
    status: str = "running"
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    copied_step: int | None = None
    """Step at which the trial last copied another trial; None if it never did."""
    costs: Costs = field(default_factory=Costs)

    @property
    def init(self) -> str:
        """A short label of the init, or of a written prompt's wording or demonstrations."""
        text = self.spec.init_text or self.spec.init_artifact or self.spec.template
        if text is None:
            return self.spec.init or (self.spec.demonstrations if self.spec.shots else "") or ""
        words = " ".join(text.split())
        return f"\u201c{words if len(words) <= 18 else words[:17] + '…'}\u201d"

    @property
    def best_metrics(self) -> Mapping[str, float]:
        return self.best

    @property
    def inherited(self) -> bool:
        """Tell whether the best evaluation comes from a trial that this trial copied."""
        return self.copied_step is not None and self.best_step <= self.copied_step

    def best_of(self, metric: str) -> float | None:
        """Return the metric at the trial's best evaluation, or None if there is none."""
        value = self.best.get(metric)
        return None if value is None else float(value)


@dataclass(frozen=True)
class SearchFacts:
    """A search as its folder keeps it.

    ``result`` is the document of ``run --json``, or None if the search has not finished.
    """

    id: str
    job: JobSpec
    run_id: str
    trials: list[TrialFacts]
    baselines: Mapping[str, Any]
    result: Mapping[str, Any] | None
    data_fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the result less trustworthy."""

    @property
    def metric(self) -> str:
        return self.job.search.metric

    @property
    def size_name(self) -> str:
        """Name of the quantity that ``TrialSpec.size`` counts with the job's method."""
        return {
            "lora": "rank",
            "qlora": "rank",
            "adapter": "bottleneck",
            "prompt_design": "demonstrations",
        }.get(self.job.method, "tokens")

    @cached_property
    def scored(self) -> list[TrialFacts]:
        """Trials with a result, best first, as the search itself ranks them."""
        return ranked(self.trials, self.job.search)

    @property
    def winner(self) -> TrialFacts | None:
        """The best trial of the result, or the best so far; None if none has been evaluated."""
        named = (self.result or {}).get("best", {}).get("trial")
        return next(
            (it for it in self.scored if it.id == named), self.scored[0] if self.scored else None
        )


def read_facts(folder: SearchFolder) -> SearchFacts:
    """Read the facts of a search, finished or not, from its folder.

    Raises BadInput for a folder without a search.
    """
    saved, job = load_saved(folder)
    trials: dict[str, TrialFacts] = {}
    baselines: Mapping[str, Any] = {}
    for event in read_events(folder).events:
        if isinstance(event, Started):
            trials[event.trial] = TrialFacts(event.trial, TrialSpec.from_config(event.config))
        elif isinstance(event, Reported) and event.report.trial in trials:
            trial, report = trials[event.report.trial], event.report
            trial.points.append((report.step, report.metrics))
            trial.best, trial.best_step = report.best_metrics, report.best_step
            if report.copied is not None:
                trial.copied_step = report.copied.step
            trial.costs = trial.costs.plus(report.costs)
        elif isinstance(event, Ended) and event.trial in trials:
            trials[event.trial].status = event.status
        elif isinstance(event, Found) and event.name == "baselines":
            baselines = event.value
    result = json.loads(folder.result.read_bytes()) if folder.result.is_file() else None
    ordered = sorted(trials.values(), key=lambda trial: (len(trial.id), trial.id))
    warnings = tuple((result or {}).get("warnings", saved.warnings))
    return SearchFacts(
        folder.id, job, saved.run_id, ordered, baselines, result, saved.data_fingerprint, warnings
    )
