"""Measure alternatives in turn in one process, so that the machine's drift affects all of them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Skipped(Exception):
    """A benchmark can't run here; the message says why."""


@dataclass(frozen=True)
class Line:
    """A line of a benchmark's table: its name, the columns shown, and more data for the JSON."""

    name: str
    shown: dict[str, float | str]
    kept: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {"name": self.name, **self.shown, **self.kept}


@dataclass
class Comparison:
    """Seconds of our side and of the peer, pair by pair."""

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
        """Return the least, median and greatest of peer / ours over the pairs."""
        each = [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]
        return min(each), statistics.median(each), max(each)

    def line(self, **more: float | str) -> Line:
        """Return a line with the ratio of the two, its spread over the pairs, and more columns."""
        low, median, high = self.ratios()
        shown = {"ours, ms": self.ours_ms, "peer, ms": self.peer_ms, "times faster": median}
        spread = {"spread": f"{low:.2f} to {high:.2f}"}
        seconds = {
            "ours, s": self.ours,
            "peer, s": self.peer,
            "ratio": {"min": low, "median": median, "max": high},
        }
        return Line(self.name, {**shown, **spread, **more}, seconds)


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], pairs: int) -> Comparison:
    """Measure the two in turn, after one warm-up run of each."""
    ours(), peer()
    comparison = Comparison(name)
    for _ in range(pairs):
        comparison.ours.append(seconds(ours))
        comparison.peer.append(seconds(peer))
    return comparison


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes, including its work on the accelerator."""
    _finish()
    start = time.perf_counter()
    call()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_fresh_process(module: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Return the JSON that ``python -m module`` prints for JSON arguments.

    A fresh process is needed to measure memory, since a process does not give back memory that it
    took before.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(lines: Sequence[Line]) -> list[str]:
    """Return the lines of a text table, with a new heading where the columns change."""
    printed: list[str] = []
    heading: list[str] = []
    for line in lines:
        if list(line.shown) != heading:
            heading = list(line.shown)
            printed.append(
                f"{'what':58}" + "".join(f" {_width(column, column)}" for column in heading)
            )
        printed.append(
            f"{line.name:58}" + "".join(f" {_width(_text(line.shown[at]), at)}" for at in heading)
        )
    return printed


def _width(text: str, column: str) -> str:
    return f"{text:>{max(14, len(column) + 2)}}"


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
