"""Forwards whose rows are divided among the workers of a group and the threads of each worker.

Training, evaluation and generation all run their rows this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.meter import Meter
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.worker_group import Group

MAX_TOKENS = 16384  # padded tokens of one forward, or of the KV cache of one batch of texts

Sums = TypeVar("Sums")


@dataclass(frozen=True)
class Share:
    """The rows that one thread runs in one forward."""

    rows: Sequence[int]
    counts: bool = True
    """False for a placeholder: a row of another worker, whose result must not be used.

    A worker without rows of its own runs one, since all workers must run equally many forwards."""


@dataclass(frozen=True)
class SharedForwards:
    """Forwards, each with the rows of all workers and threads."""

    forwards: Sequence[Sequence[int]]
    lengths: Sequence[int]
    """Number of tokens of each row."""
    group: Group
    threads: Threads
    copies: int = 1
    """Number of times that each row stands in its forward, such as once for each prompt."""
    meter: Meter = field(default_factory=Meter)
    """Counts the rows that are done."""

    def run(self, start: Callable[[], Sums], work: Callable[[Share, Sums], None]) -> list[Sums]:
        """Run this worker's share of every forward; return what each of its threads summed up.

        ``start`` makes a thread's empty sums, and ``work`` runs one share and adds to them. torch's
        modes (no_grad, inference_mode) apply to one thread only, so ``work`` must set those that it
        needs. Raises NoRoom when memory runs out.
        """

        def part_sums(part: int) -> Sums:
            sums = start()
            for share in self._shares(part):
                with self._needs_room(share):
                    work(share, sums)
                if share.counts:
                    # The group's other workers have run as many rows of the same forwards.
                    self.meter.add(len(share.rows) * self.group.size)
            return sums

        return self.threads.each(part_sums)

    def _shares(self, part: int) -> Iterator[Share]:
        """Yield the share of each forward of the worker's thread ``part``."""
        for rows in self.forwards:
            own = self.threads.share(self.group.share(rows))[part]
            if own:
                yield Share(own)
            elif self.threads.ways == 1:
                yield Share(rows[:1], counts=False)

    def _needs_room(self, share: Share) -> AbstractContextManager[None]:
        tokens = self.copies * len(share.rows) * max(self.lengths[row] for row in share.rows)
        # Forwards that run side by side need less memory one at a time, even with one row each.
        return needs_room(tokens, divisible=len(share.rows) > 1 or self.threads.ways > 1)
