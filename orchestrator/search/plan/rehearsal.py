"""A rehearsal of a search's start, which measures the overhead of Ray, Train and Tune.

It shows how long they take to start on this machine in its current state, and how long a report
takes from the worker to Tune and back. The rehearsal is a search of two steps per trial on one row
of each split, with the job's own model, workers and slots.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.job.space import TrialSpec
from orchestrator.search.plan.measure import shortened
from orchestrator.search.prepare import Prepared
from orchestrator.search.state.history import History
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.running import running
from orchestrator.tuning.reports import Report
from orchestrator.utils.interrupts import whole

REPORT_S = 0.03
"""Seconds of a report's way to Tune and back on an idle machine.

This figure is used if no rehearsal measures it, as with workers of a single slot.
"""


@dataclass(frozen=True)
class Rehearsal:
    """The measurements of a rehearsal.

    ``start_s`` are the seconds from when Ray is up to the end of the first round, by which workers,
    models and Tune's trials are all there. ``report_s`` are the seconds of a report's way from the
    worker to Tune and back. ``held`` is the most memory that a worker held, in bytes.
    """

    start_s: float
    report_s: float
    held: int = 0


class Moments:
    """A study's listener that records when reports come, and the most memory that a worker held."""

    def __init__(self) -> None:
        self.times: list[tuple[float, bool]] = []
        """The time of each report, and whether another report of the same round follows."""
        self.held = 0

    def trial_started(self, trial: str, spec: TrialSpec) -> None: ...

    def trial_reported(self, trial: str, report: Report) -> None:
        self.times.append((time.monotonic(), report.pending > 0))
        self.held = max(self.held, report.costs.peak_bytes)

    def trial_ended(self, trial: str, status: str, note: str) -> None: ...

    def first_round(self) -> float:
        """Return the time of the first report."""
        return self.times[0][0]

    def report_s(self) -> float:
        """Return the median seconds between two reports of a round.

        Nothing is trained between such reports. Without any, the usual figure is returned.
        """
        pairs = zip(self.times, self.times[1:], strict=False)
        found = [second - first for (first, more), (second, _) in pairs if more]
        return statistics.median(found) if found else REPORT_S


def rehearse(prepared: Prepared, placement: Placement, storage: Path) -> Rehearsal:
    """Rehearse the search's start in the Ray that is up.

    Raises the errors that the search itself would raise.
    """
    moments = Moments()
    started = time.monotonic()
    with (
        whole(partial(running, shortened(prepared, placement), placement, storage)) as search,
        search.or_abandon(),
    ):
        search.study([moments], History())
    return Rehearsal(moments.first_round() - started, moments.report_s(), moments.held)
