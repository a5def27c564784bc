"""The history of a search before this process: empty, or as its journal records it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.job.space import TrialSpec
from orchestrator.search.state.events import Ended, Event, Found, Listener, Reported, Started, tell
from orchestrator.search.state.trials import Outcome
from orchestrator.tuning.reports import Report


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

    def steps(self) -> dict[str, int]:
        """Return the newest reported step of each trial that has reported."""
        return {report.trial: report.step for report in self.reports}

    def first_specs(self) -> dict[str, TrialSpec]:
        """Return the spec with which each trial started, before it copied other trials."""
        return {event.trial: event.spec for event in self.events if isinstance(event, Started)}

    def outcome(self) -> Outcome:
        """Return the records of all trials that have started."""
        outcome = Outcome()
        self.tell(outcome)
        return outcome

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

    def part(self, *, confirming: bool) -> History:
        """Return the history of the search's own trials, or of those that confirm them."""
        confirm = {trial for trial, spec in self.first_specs().items() if spec.confirms}
        kept = [event for event in self.events if (trial_of(event) in confirm) == confirming]
        return replace(self, events=kept)

    def tell(self, listener: Listener) -> None:
        """Replay all events to a listener. Each trial's reports carry its newest checkpoint."""
        for event in self.events:
            tell(self._with_checkpoint(event), listener)

    def _with_checkpoint(self, event: Event) -> Event:
        if not isinstance(event, Reported):
            return event
        checkpoint = self.checkpoints.get(event.report.trial, b"")
        return replace(event, report=replace(event.report, checkpoint=checkpoint))

    def remaining(self, trials: Collection[str]) -> list[str]:
        """Return the trials that have not ended, in order."""
        return [trial for trial in trials if trial not in self.ended]


def trial_of(event: Event) -> str | None:
    """Return the trial of an event; None for an event of the whole search."""
    if isinstance(event, Found):
        return None
    return event.report.trial if isinstance(event, Reported) else event.trial
