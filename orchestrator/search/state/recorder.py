"""Record a search's events: write them to disk in whole rounds, then pass them on.

A round is what a worker trains and evaluates at once. Its events are written together, so that a
search that dies resumes from the end of a round, with the same trials side by side. Therefore a
scheduler decides as it would have without the interruption. Training does not wait for the disk: a
thread writes, and the events that arrive meanwhile form its next batch.
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
from orchestrator.search.state.trials import TrialStatus
from orchestrator.tuning.reports import Report

Sink = Callable[[Sequence[Event]], None]


class Recorder:
    """A study's listener that writes the journal.

    ``sink`` receives each event once it is on disk, so it never knows more than the journal. If the
    disk does not accept the state, ``on_problem`` is called once, and ``sink`` receives the events
    regardless.
    """

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
        self._add(Started(trial, spec))

    def trial_reported(self, trial: str, report: Report) -> None:
        self._add(Reported(report))

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None:
        self._add(Ended(trial, status, note))

    def found(self, name: str, value: Any) -> Found:
        """Record a fact about the search at once, even in the middle of a round."""
        event = Found(name, value)
        with self._changed:
            self._ready.append(event)
            self._changed.notify_all()
        return event

    def flush(self) -> None:
        """Write everything, since the study is over, and wait until it is written."""
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
        """Write all complete rounds; drop an incomplete round, which is trained again."""
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

    # The methods below run in the writer's thread.

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
        """Wait for the next batch and return it; empty at the end."""
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
                f"the search's state can't be written ({error.strerror}); the search goes on "
                "without it"
            )
