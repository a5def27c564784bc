"""The confirmation of a search: its best configurations under fresh seeds, ranked by the mean.

The value that put a configuration at the top of a search is the best of many, so it flatters the
configuration: of two equally good ones, the luckier is ahead. Fresh runs were not chosen by their
results, so their mean does not have this bias. Therefore neither the ranking nor the choice of the
prompt takes the first run into account, which is only shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from orchestrator.job.space import TrialSpec, fresh_seeds
from orchestrator.job.spec import SearchSpec
from orchestrator.search.state.trials import Metrics, TrialRecord, TrialStatus, ranked
from orchestrator.utils.wording import counted


def top_configurations(trials: Iterable[TrialRecord], search: SearchSpec) -> list[TrialRecord]:
    """Return the best trial of each of the ``search.confirm`` best configurations, best first.

    Trials that differ in the seed alone have the same configuration.
    """
    best: dict[TrialSpec, TrialRecord] = {}
    for trial in ranked(trials, search):
        best.setdefault(replace(trial.spec, seed=0), trial)
    return list(best.values())[: search.confirm or 0]


def confirming_trials(first_runs: Iterable[TrialRecord], search: SearchSpec) -> list[TrialSpec]:
    """Return the fresh runs of the configurations, those of one configuration side by side."""
    seeds = fresh_seeds(search)
    return [
        replace(trial.spec, seed=seed, confirms=trial.id) for trial in first_runs for seed in seeds
    ]


@dataclass(frozen=True)
class Confirmed:
    """A configuration with its fresh runs."""

    first: TrialRecord
    """The trial that put the configuration at the top of the search."""
    runs: Sequence[TrialRecord]

    @property
    def sound(self) -> list[TrialRecord]:
        """The runs that came to their end with a result."""
        return [run for run in self.runs if run.metrics and run.status == TrialStatus.FINISHED]

    @property
    def failed(self) -> int:
        """The number of runs without a result."""
        return len(self.runs) - len(self.sound)

    def values(self, metric: str) -> list[float]:
        """Return the sound runs' validation values of a metric."""
        return [run.metrics[metric] for run in self.sound if metric in run.metrics]

    def best_run(self, search: SearchSpec) -> TrialRecord:
        """Return the fresh run with the best validation value, whose prompt is the result."""
        plain = [replace(run, spec=replace(run.spec, confirms="")) for run in self.sound]
        best = ranked(plain, search)[0]
        return next(run for run in self.sound if run.id == best.id)

    def document(self, search: SearchSpec) -> dict[str, Any]:
        """Return the configuration's figures as ``run --json`` prints them."""
        names = self.sound[0].metrics if self.sound else {}
        columns = {name: self.values(name) for name in names}
        return {
            "trial": self.first.id,
            "config": {key: it for key, it in self.first.spec.config().items() if key != "seed"},
            "first_run": self.first.metrics,
            "runs": [run.id for run in self.runs],
            "seeds": [run.spec.seed for run in self.runs],
            "failed": self.failed,
            "mean": {name: mean(column) for name, column in columns.items()},
            "std": {name: stdev(column) for name, column in columns.items() if len(column) > 1},
            "best_run": self.best_run(search).id if self.sound else None,
        }


def confirmed(trials: Iterable[TrialRecord], search: SearchSpec) -> list[Confirmed]:
    """Return the confirmed configurations, best first; empty without a confirmation.

    A configuration of which a run failed comes after all others, since the mean over the runs that
    are left would hide what it risks. One without any sound run comes last.
    """
    known = {trial.id: trial for trial in trials}
    runs: dict[str, list[TrialRecord]] = {}
    for trial in known.values():
        if trial.spec.confirms in known:
            runs.setdefault(trial.spec.confirms, []).append(trial)
    sign = -1.0 if search.better == "max" else 1.0

    def key(found: Confirmed) -> tuple[bool, bool, float, float, str]:
        values, losses = found.values(search.metric), found.values("loss")
        place = sign * mean(values) if values else 0.0
        loss = mean(losses) if losses else 0.0
        return not values, found.failed > 0, place, loss, found.first.id

    return sorted((Confirmed(known[name], found) for name, found in runs.items()), key=key)


def ranking(trials: Iterable[TrialRecord], search: SearchSpec) -> list[TrialRecord]:
    """Return the trials whose prompts are the result, best first.

    The best fresh run of each confirmed configuration comes first. The trials of configurations
    that were not confirmed follow as the search ranks them. If no fresh run has a result, the
    search's own ranking stands.
    """
    trials = list(trials)
    own, found = ranked(trials, search), confirmed(trials, search)
    chosen = [one.best_run(search) for one in found if one.sound]
    if not chosen:
        return own
    tried = {replace(one.first.spec, seed=0) for one in found}
    return [*chosen, *(trial for trial in own if replace(trial.spec, seed=0) not in tried)]


def confirmed_text(documents: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Say in a sentence which configurations were confirmed, best first."""
    return "confirmed: " + ", before ".join(_one_text(found, metric) for found in documents)


def _one_text(found: Mapping[str, Any], metric: str) -> str:
    first_run = f"first run {found['first_run'][metric]:.3f}"
    sound = len(found["runs"]) - found["failed"]
    if not sound:
        return f"{found['trial']} without a result under any fresh seed ({first_run})"
    spread = f" \u00b1 {found['std'][metric]:.3f}" if metric in found["std"] else ""
    failed = f"; {found['failed']} failed, so it comes after all others" if found["failed"] else ""
    return (
        f"{found['trial']} {found['mean'][metric]:.3f}{spread} over {counted(sound, 'seed')} "
        f"({first_run}{failed})"
    )


def spread_metrics(found: Confirmed) -> Metrics:
    """Return a configuration's figures as metrics of the search's MLflow run."""
    named: Metrics = {f"confirmed_{found.first.id}_seeds": float(len(found.sound))}
    for name in found.sound[0].metrics if found.sound else ():
        values = found.values(name)
        named[f"confirmed_{found.first.id}_{name}_mean"] = mean(values)
        if len(values) > 1:
            named[f"confirmed_{found.first.id}_{name}_std"] = stdev(values)
    return named
