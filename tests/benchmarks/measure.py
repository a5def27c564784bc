"""Two ways of doing the same, measured in turn in one process, so that a machine's drift hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Comparison:
    """Seconds of ours and the peer's, pair by pair."""

    name: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    @property
    def ours_ms(self) -> float:
        return 1000 * statistics.median(self.ours)

    @property
    def peer_ms(self) -> float:
        return 1000 * statistics.median(self.peer)

    def ratios(self) -> tuple[float, float, float]:
        """Least, median and greatest of peer / ours over the pairs."""
        each = [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]
        return min(each), statistics.median(each), max(each)

    def document(self) -> dict[str, Any]:
        low, median, high = self.ratios()
        return {**vars(self), "ratio": {"min": low, "median": median, "max": high}}


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], pairs: int = 7) -> Comparison:
    """Alternate the two, after one run of each that does not count."""
    ours(), peer()
    comparison = Comparison(name)
    for _ in range(pairs):
        comparison.ours.append(_seconds(ours))
        comparison.peer.append(_seconds(peer))
    return comparison


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
