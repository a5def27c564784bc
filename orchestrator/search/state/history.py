"""The history of a search before this process: empty, or as its journal records it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestrator.job.space import TrialSpec
from orchestrator.search.state.events import Ended, Event, Found, Reported, Started
from orchestrator.tuning.reports import Report

if TYPE_CHECKING:
    from orchestrator.search.study.study import Listener


@dataclass
class History:
    """The events of a search so far, in order.

    ``spent_s`` is the time that they took in seconds, ``length`` the size of their journal in
    bytes, and ``checkpoints`` holds the newest checkpoint of each trial.
    """

    events: list[Event] = field(default_factory=list)
    spent_s: float = 0.0
    length: int = 0
    checkpoints: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    """Trials that begin again because their checkpoint can't be read, with the reason."""
    checkpoint_at: Callable[[str, int], bytes] = lambda trial, step: b""
    """A function that reads a trial's checkpoint at a step at which the trial was compared; empty
    where there is none. Such checkpoints are kept for populations."""

    @property
    def reports(self) -> list[Report]:
        return [event.report for event in self.events if isinstance(event, Reported)]

    @property
    def ended(self) -> dict[str, Ended]:
        return {event.trial: event for event in self.events if isinstance(event, Ended)}

    @property
    def started(self) -> set[str]:
        return {event.trial for event in self.events if isinstance(event, Started)}

    def steps(self) -> dict[str, int]:
        """Return the newest reported step of each trial that has reported."""
        return {report.trial: report.step for report in self.reports}

    def configs(self) -> dict[str, dict[str, Any]]:
        """Return the configuration with which each trial started."""
        return {event.trial: event.config for event in self.events if isinstance(event, Started)}

    def first_specs(self) -> dict[str, TrialSpec]:
        """Return the spec with which each trial started."""
        return {trial: TrialSpec.from_config(config) for trial, config in self.configs().items()}

    def specs(self) -> dict[str, TrialSpec]:
        """Return the current spec of each trial, which may have copied other trials."""
        copied = {report.trial: report.copied.spec for report in self.reports if report.copied}
        return self.first_specs() | copied

    def own_scores(self) -> dict[str, float | None]:
        """Return the own score of each trial that has reported."""
        return {report.trial: report.own_score for report in self.reports}

    def found(self, name: str) -> Found | None:
        return next(
            (event for event in self.events if isinstance(event, Found) and event.name == name),
            None,
        )

    def without(self, lost: Mapping[str, str]) -> History:
        """Return the history with the ``lost`` trials reset: only their starts are kept."""
        kept = [
            event
            for event in self.events
            if isinstance(event, Started) or trial_of(event) not in lost
        ]
        return replace(self, events=kept, lost=dict(lost))

    def tell(self, listener: Listener) -> None:
        """Replay all events to a listener. Each trial's reports carry its newest checkpoint."""
        for event in self.events:
            if isinstance(event, Started):
                listener.trial_started(event.trial, TrialSpec.from_config(event.config))
            elif isinstance(event, Reported):
                checkpoint = self.checkpoints[event.report.trial]
                listener.trial_reported(
                    event.report.trial, replace(event.report, checkpoint=checkpoint)
                )
            elif isinstance(event, Ended):
                listener.trial_ended(event.trial, event.status, event.note)

    def remaining(self, trials: Collection[str]) -> list[str]:
        """Return the trials that have not ended, in order."""
        return [trial for trial in trials if trial not in self.ended]


def trial_of(event: Event) -> str | None:
    """Return the trial of an event; None for an event of the whole search."""
    if isinstance(event, Found):
        return None
    return event.report.trial if isinstance(event, Reported) else event.trial
