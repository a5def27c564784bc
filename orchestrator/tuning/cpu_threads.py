"""A CPU's cores for one step: each takes some of the rows through the whole model.

Cores that share every single operation wait for each other hundreds of times a forward, which costs a small model more
than it gains and stalls where anything else runs on the machine. Those that share the rows wait once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""Threads at most: Python lets one of them prepare an operation at a time. Further cores share their operations."""

STATEFUL_ROPE = frozenset({"dynamic", "longrope"})
"""Position encodings that keep in the model what the rows of the last forward needed."""


@dataclass(frozen=True)
class Threads:
    """``count`` cores of one process, and in how many ``ways`` rows are dealt out among them."""

    count: int = 1
    ways: int = 1
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, count: int, model: Any, device: torch.device) -> Threads:
        """What ``count`` cores can do for forwards of the model: an accelerator, and a model that remembers its last
        forward, take one at a time."""
        if (
            count == 1
            or device.type != "cpu"
            or _rope_types(model.config.to_dict()) & STATEFUL_ROPE
        ):
            return cls(count)
        ways = min(count, MOST)
        return cls(
            count, ways, ThreadPoolExecutor(ways, "rows", torch.set_num_threads, (count // ways,))
        )

    def together(self) -> Threads:
        """The same cores, all at one forward."""
        return replace(self, ways=1)

    def share(self, places: Sequence[int]) -> list[Sequence[int]]:
        """The rows of each part; none where there are fewer rows than parts."""
        return [places[part :: self.ways] for part in range(self.ways)]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """``work(part)`` of every part, side by side; results in the parts' order.

        When all have ended, the error of the first part that failed is raised. torch's modes (no_grad, inference_mode)
        are a thread's own: ``work`` sets those that it needs.
        """
        self._set(self.ways)
        if self._pool is None or self.ways == 1:
            return [work(part) for part in range(self.ways)]
        futures = [self._pool.submit(work, part) for part in range(self.ways)]
        wait(futures)
        return [future.result() for future in futures]

    def _set(self, ways: int) -> None:
        """An operation's threads: torch's are this thread's own, the mathematics library's everybody's."""
        if self._pool is not None and torch.get_num_threads() != self.count // ways:
            torch.set_num_threads(self.count // ways)


def _rope_types(config: Any) -> set[str]:
    """Every ``rope_type`` at any depth of a configuration's document."""
    if not isinstance(config, dict):
        return set()
    own = {config["rope_type"]} if isinstance(config.get("rope_type"), str) else set()
    return own.union(*map(_rope_types, config.values()))
