"""What has happened in a search before this process: nothing, or what its journal says."""

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
    """Events in their order, the seconds that they took, the length of their journal in bytes, and each trial's newest
    checkpoint."""

    events: list[Event] = field(default_factory=list)
    spent_s: float = 0.0
    length: int = 0
    checkpoints: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    """Trials that begin again because their checkpoint can't be read, and why."""
    checkpoint_at: Callable[[str, int], bytes] = lambda trial, step: b""
    """A trial's checkpoint at a step that it was compared at, empty where there is none; kept for populations."""

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
        """The newest reported step of each trial that has reported."""
        return {report.trial: report.step for report in self.reports}

    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration that each trial started with."""
        return {event.trial: event.config for event in self.events if isinstance(event, Started)}

    def first_specs(self) -> dict[str, TrialSpec]:
        """The same as specs."""
        return {trial: TrialSpec.from_config(config) for trial, config in self.configs().items()}

    def specs(self) -> dict[str, TrialSpec]:
        """What each trial is by now: it may have copied others."""
        copied = {report.trial: report.copied.spec for report in self.reports if report.copied}
        return self.first_specs() | copied

    def own_scores(self) -> dict[str, float | None]:
        """The own score of each trial that has reported."""
        return {report.trial: report.own_score for report in self.reports}

    def found(self, name: str) -> Found | None:
        return next(
            (event for event in self.events if isinstance(event, Found) and event.name == name),
            None,
        )

    def without(self, lost: Mapping[str, str]) -> History:
        """The same search with some trials not begun."""
        kept = [
            event
            for event in self.events
            if isinstance(event, Started) or trial_of(event) not in lost
        ]
        return replace(self, events=kept, lost=dict(lost))

    def tell(self, listener: Listener) -> None:
        """Tell a listener everything again. Each trial's reports carry its newest checkpoint."""
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
        """Trials that are not over, in order."""
        return [trial for trial in trials if trial not in self.ended]


def trial_of(event: Event) -> Any:
    """The trial that an event is about, None for the search's own."""
    return event.report.trial if isinstance(event, Reported) else getattr(event, "trial", None)
