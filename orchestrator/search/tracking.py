"""Logging of a search's events to MLflow: a run for each trial, and the search's own metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from orchestrator.registry import SearchLog
from orchestrator.search.state.events import Ended, Event, Found, Reported, Started, tell
from orchestrator.search.state.history import History, trial_of
from orchestrator.search.state.trials import Outcome, TrialStatus
from orchestrator.tuning.reports import Report

# The names of the facts that a search records once.
BASE_MODEL = "base_model"
BASELINE_RESULTS = "baselines"
CONFIRMATION = "confirmation"
SPLITS = ("validation", "test")
# The keys of a trial's configuration that become tags, since people filter runs by them.
TAGGED = (
    "method",
    "init",
    "num_virtual_tokens",
    "rank",
    "alpha",
    "bottleneck",
    "shots",
    "demonstrations",
)

RUN_STATES: dict[TrialStatus, Literal["finished", "stopped", "failed"]] = {
    TrialStatus.FINISHED: "finished",
    TrialStatus.STOPPED: "stopped",
    TrialStatus.FAILED: "failed",
}


class MlflowMirror:
    """A writer of a search's events to its MLflow log.

    Each event carries its own time, so that writing an event again changes nothing. With
    ``copying``, trials copy each other, which changes their configuration. The changed values are
    then logged as metrics by step, since the parameters of an MLflow run can't change.
    """

    def __init__(
        self, log: SearchLog, copying: bool = False, tags: Mapping[str, Any] | None = None
    ) -> None:
        """Write to ``log``; every trial's run gets ``tags``, which the search's run has too."""
        self._log = log
        self._tags = dict(tags or {})
        self._copying = copying
        self._trials = Outcome()
        self._notes: dict[str, str] = {}

    def restore(self, history: History) -> None:
        """Write again the events of all runs that have no end in MLflow.

        A process that was killed may not have written all of them.
        """
        for event in history.events:
            if trial_of(event) in self._log.ended:
                tell(event, self._trials)
            else:
                self._one(event)

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            self._one(event)

    def _one(self, event: Event) -> None:
        tell(event, self._trials)
        if isinstance(event, Started):
            config = flat(event.spec.config())
            shown = {name: config[name] for name in TAGGED if name in config}
            if event.spec.confirms:
                shown["orchestrator.confirms"] = event.spec.confirms
            self._log.trial_started(event.trial, config, event.at, self._tags | shown)
        elif isinstance(event, Reported):
            self._reported(event.report, event.at)
        elif isinstance(event, Ended):
            self._ended(event)
        elif event.name == BASELINE_RESULTS:
            self._log.parent_metrics(baseline_metrics(event), at=event.at)

    def _reported(self, report: Report, at: int) -> None:
        named = {f"validation_{name}": value for name, value in report.metrics.items()}
        if self._copying:
            spec = self._trials.records[report.trial].spec
            named |= {
                "learning_rate": spec.learning_rate,
                "num_virtual_tokens": float(spec.num_virtual_tokens),
            }
        self._log.trial_metrics(
            report.trial, report.step, {**named, "train_loss": report.train_loss}, at
        )
        if report.note and self._notes.get(report.trial) != report.note:
            self._notes[report.trial] = report.note
            self._log.trial_tags(report.trial, {"orchestrator.memory": report.note})

    def _ended(self, event: Ended) -> None:
        record = self._trials.records.get(event.trial)
        if record is None:
            return  # the search ended before the trial started, so it has no run
        self._log.trial_metrics(event.trial, record.step, record.costs.metrics(), event.at)
        note = event.note if event.status == TrialStatus.FAILED else ""
        self._log.trial_ended(event.trial, RUN_STATES[event.status], note, event.at)


def baseline_metrics(found: Found) -> dict[str, float]:
    """Return the baselines' metrics by their names in the search's run."""
    return {
        f"{name}_{split}_{metric}": value
        for name, baseline in found.value.items()
        for split in SPLITS
        for metric, value in baseline[split].items()
    }


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a trial's configuration: the text or artifact of an init gets its own parameter."""
    init = config.get("init")
    if isinstance(init, dict):
        ((name, value),) = init.items()
        return {**config, "init": name, f"init_{name}": value}
    return config
