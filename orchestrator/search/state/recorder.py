"""Keeps a search's state up to date: hears of every event, writes whole rounds, then passes them on.

A round is what a worker trains and evaluates at once. Its events are written together, so that a search that dies goes
on from the end of a round, with the trials side by side that were; that is what makes a scheduler decide as it would
have. Nothing waits for the disk: a thread writes, and what comes meanwhile is its next batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from orchestrator.job.space import TrialSpec
from orchestrator.search.state.events import Ended, Event, Found, Reported, Started
from orchestrator.search.state.history import History
from orchestrator.search.state.journal import Journal
from orchestrator.tuning.reports import Report

Sink = Callable[[Sequence[Event]], None]


class Recorder:
    """A study's listener. ``sink`` gets every event once it is on disk, so that it never knows more than the journal;
    ``on_problem`` hears, once, that the disk does not take the state."""

    def __init__(
        self, journal: Journal, history: History, sink: Sink, on_problem: Callable[[str], None]
    ) -> None:
        self._journal = journal
        self._sink = sink
        self._on_problem = on_problem
        self._zero = time.monotonic() - history.spent_s
        self._round: list[Event] = []
        self._ready: list[Event] = []
        self._unwritten: list[Event] = []
        self._said_so = False
        self._idle = True
        self._closed = False
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._work, name="state-writer", daemon=True)
        self._writer.start()

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        self._add(Started(trial, spec.config()))

    def trial_reported(self, trial: str, report: Report) -> None:
        self._add(Reported(report))

    def trial_ended(self, trial: str, status: str, note: str) -> None:
        self._add(Ended(trial, status, note))

    def found(self, name: str, value: Any) -> Found:
        """Keep what the search found out, at once and whatever round is under way."""
        event = Found(name, value)
        with self._changed:
            self._ready.append(event)
            self._changed.notify_all()
        return event

    def flush(self) -> None:
        """The study is over: write everything, and wait for it."""
        with self._changed:
            self._pass_on()
            while self._writer.is_alive() and (self._ready or not self._idle):
                self._changed.wait(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is whole; the beginning of a round is dropped, it will be trained again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join()

    def _add(self, event: Event) -> None:
        with self._changed:
            self._round.append(event)
            within = any(isinstance(one, Reported) for one in self._round)
            if not within or (isinstance(event, Reported) and not event.report.pending):
                self._pass_on()

    def _pass_on(self) -> None:
        self._ready += self._round
        self._round = []
        self._changed.notify_all()

    # From here on: the writer's thread.

    def _work(self) -> None:
        while events := self._take():
            self._unwritten += events
            try:
                self._journal.append(self._unwritten, time.monotonic() - self._zero)
                self._unwritten = []
            except OSError as error:
                self._problem(error)
            self._sink(events)
        if self._unwritten:
            try:
                self._journal.append(self._unwritten, time.monotonic() - self._zero)
            except OSError as error:
                self._problem(error)

    def _take(self) -> list[Event]:
        """The next batch, once there is one; nothing at the end."""
        with self._changed:
            self._idle = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._closed)
            events, self._ready, self._idle = self._ready, [], False
            return events

    def _problem(self, error: OSError) -> None:
        if not self._said_so:
            self._said_so = True
            self._on_problem(
                f"the search's state can't be written ({error.strerror}); the search goes on without it"
            )
