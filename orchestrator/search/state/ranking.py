"""The ranking of a search's trials, which its result and its report share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from orchestrator.job.spec import SearchSpec


class Candidate(Protocol):
    """A trial as the ranking sees it."""

    @property
    def id(self) -> str: ...

    @property
    def status(self) -> str: ...

    @property
    def best_metrics(self) -> Mapping[str, float]:
        """Validation metrics of the best evaluation; empty before the first evaluation."""

    @property
    def inherited(self) -> bool:
        """Tell whether the best evaluation comes from a trial that this trial copied."""


Trial = TypeVar("Trial", bound=Candidate)


def ranked(trials: Iterable[Trial], search: SearchSpec) -> list[Trial]:
    """Sort the trials with a result, best first: by the metric, then the loss, then the id.

    Failed trials are left out. So is a trial that copied another trial's best prompt and found no
    better one, if the source is in the ranking: both have the same prompt.
    """
    sign = -1.0 if search.better == "max" else 1.0
    scored = [
        trial
        for trial in trials
        if search.metric in trial.best_metrics and trial.status != "failed"
    ]
    own_results = [trial.best_metrics for trial in scored if not trial.inherited]

    def is_ranked(trial: Trial) -> bool:
        return not trial.inherited or trial.best_metrics not in own_results

    def key(trial: Trial) -> tuple[float, float, str]:
        metrics = trial.best_metrics
        return sign * metrics[search.metric], metrics.get("loss", 0.0), trial.id

    return sorted(filter(is_ranked, scored), key=key)
