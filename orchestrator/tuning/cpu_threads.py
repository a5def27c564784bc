"""Use of a CPU's cores for one step: each core takes some of the rows through the whole model.

Cores that share every single operation wait for each other hundreds of times per forward. For a
small model the waits cost more than the sharing gains, and they stall when anything else runs on
the machine. Cores that share the rows wait for each other once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

MOST = 8
"""Maximum number of threads, since Python lets only one of them prepare an operation at a time.

Further cores are used inside the threads' operations."""

STATEFUL_ROPE = frozenset({"dynamic", "longrope"})
"""Position encodings that store state in the model, which depends on the last forward's rows."""


@dataclass(frozen=True)
class Threads:
    """The cores of one process, and how rows are divided among them."""

    count: int = 1
    """Number of cores."""
    ways: int = 1
    """Number of threads that run forwards side by side, each with its own rows."""
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, count: int, model: PreTrainedModel, device: torch.device) -> Threads:
        """Choose how ``count`` cores run forwards of the model.

        Forwards run one at a time on an accelerator, and in a model that keeps state of its last
        forward.
        """
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
        """Return the same cores, all working on one forward at a time."""
        return replace(self, ways=1)

    def share(self, places: Sequence[int]) -> list[Sequence[int]]:
        """Divide rows into ``ways`` parts; some parts are empty if there are fewer rows."""
        return [places[part :: self.ways] for part in range(self.ways)]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Run ``work(part)`` for every part side by side and return the results in order.

        If parts fail, the error of the first of them is raised after all parts have ended. torch's
        modes (no_grad, inference_mode) apply to one thread only, so ``work`` must set those that it
        needs.
        """
        self._set(self.ways)
        if self._pool is None or self.ways == 1:
            return [work(part) for part in range(self.ways)]
        futures = [self._pool.submit(work, part) for part in range(self.ways)]
        wait(futures)
        return [future.result() for future in futures]

    def _set(self, ways: int) -> None:
        """Set the number of threads that share one operation.

        torch keeps this number per thread, the mathematics library per process.
        """
        if self._pool is not None and torch.get_num_threads() != self.count // ways:
            torch.set_num_threads(self.count // ways)


def _rope_types(config: object) -> set[str]:
    """Collect every ``rope_type`` at any depth of a model configuration."""
    if not isinstance(config, dict):
        return set()
    own = {config["rope_type"]} if isinstance(config.get("rope_type"), str) else set()
    return own.union(*map(_rope_types, config.values()))
