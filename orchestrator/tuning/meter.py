"""Progress within a round or an evaluation, counted by the engine while it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["training", "evaluating", "generating"]

EVERY_S = 1.5
"""Seconds between two readings that are told."""


@dataclass(frozen=True)
class Span:
    """The steps that a trial takes in a round."""

    first: int
    target: int


@dataclass(frozen=True)
class Reading:
    """How far a worker is within its round, or within the evaluation of a split."""

    phase: Phase
    done: int
    """Number of steps done if the phase is training, otherwise of rows."""
    total: int
    seconds: float
    """Time since the phase began."""
    lasted: float
    """Time since the round or evaluation began."""
    trials: Mapping[str, Span] = field(default_factory=dict)
    """The trials of the round; empty outside rounds."""
    subject: str = ""
    """The text and split that are evaluated outside rounds."""

    @property
    def rate(self) -> float:
        """Return the steps or rows per second; 0 before the first."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    def step_of(self, trial: str) -> int:
        """Return the step that a trial of the round has reached."""
        span = self.trials[trial]
        return min(span.first + self.done, span.target) if self.phase == "training" else span.target


class Meter:
    """A meter that nobody reads: it counts nothing."""

    def start(self, trials: Mapping[str, Span], subject: str = "") -> None:
        """Begin a round of these trials, or the evaluation of a subject."""

    def begin(self, phase: Phase, total: int) -> None:
        """Begin a phase of ``total`` steps or rows. A phase that is repeated begins again."""

    def add(self, count: int = 1) -> None:
        """Count steps or rows as done."""


class TellingMeter(Meter):
    """A meter that passes a reading to ``tell`` every ``every`` seconds while work gets done.

    Threads that run forwards side by side may all add to it. ``tell`` must return at once.
    """

    def __init__(
        self,
        tell: Callable[[Reading], None],
        every: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._every = every
        self._clock = clock
        self._lock = threading.Lock()
        self._trials: Mapping[str, Span] = {}
        self._subject = ""
        self._phase: Phase = "training"
        self._done = self._total = 0
        self._started = self._begun = self._told = clock()

    def start(self, trials: Mapping[str, Span], subject: str = "") -> None:
        self._trials, self._subject = trials, subject
        self._started = self._clock()

    def begin(self, phase: Phase, total: int) -> None:
        self._phase, self._done, self._total = phase, 0, total
        self._begun = self._clock()

    def add(self, count: int = 1) -> None:
        now = self._clock()
        with self._lock:
            self._done += count
            if now - self._told < self._every:
                return
            self._told = now
            reading = self._reading(now)
        self._tell(reading)

    def _reading(self, now: float) -> Reading:
        return Reading(
            self._phase,
            min(self._done, self._total),
            self._total,
            now - self._begun,
            now - self._started,
            self._trials,
            self._subject,
        )
