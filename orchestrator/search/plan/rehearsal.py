"""A search's start, rehearsed: what Ray, the workers and Tune take on this machine as it is now, and a report's way.

It is a search of two steps a trial on next to no rows, with the job's own model, workers and slots.
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

REPORT_S = 0.03  # a report's way to Tune and back on an idle machine; where a worker has one slot it can't be seen


@dataclass(frozen=True)
class Rehearsal:
    """``start_s``: from a Ray that is up to the end of the first round, with workers, models and Tune's trials there.

    ``report_s``: a report's way from the worker to Tune and back. ``held``: the most bytes that a worker held.
    """

    start_s: float
    report_s: float
    held: int = 0


class Moments:
    """A study's listener: when each round's reports came, and what the worker held by then."""

    def __init__(self) -> None:
        self.times: list[tuple[float, bool]] = []
        """Of each report, and whether another one of the same round follows."""
        self.held = 0

    def trial_started(self, trial: str, spec: TrialSpec) -> None: ...

    def trial_reported(self, trial: str, report: Report) -> None:
        self.times.append((time.monotonic(), report.pending > 0))
        self.held = max(self.held, report.costs.peak_bytes)

    def trial_ended(self, trial: str, status: str, note: str) -> None: ...

    def first_round(self) -> float:
        """When the first report came."""
        return self.times[0][0]

    def report_s(self) -> float:
        """Seconds between two reports of a round: nothing is trained between them."""
        pairs = zip(self.times, self.times[1:], strict=False)
        found = [second - first for (first, more), (second, _) in pairs if more]
        return statistics.median(found) if found else REPORT_S


def rehearse(prepared: Prepared, placement: Placement, storage: Path) -> Rehearsal:
    """In the Ray that is up. Raises what the search itself would."""
    moments = Moments()
    started = time.monotonic()
    with (
        whole(partial(running, shortened(prepared, placement), placement, storage)) as search,
        search.or_abandon(),
    ):
        search.study([moments], History())
    return Rehearsal(moments.first_round() - started, moments.report_s(), moments.held)
