"""Recovery when memory runs out: work is cut into smaller pieces and done again.

The result stays the same. Forwards are cut first (fewer padded tokens each, more forwards), then
the pack (fewer prompts at a time). The sizes that fitted are remembered for the next step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Result = TypeVar("Result")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Phrases in the messages of torch's allocators and CUDA's libraries when memory ran out.

Needed for errors that have no type of their own."""


class NoRoom(Exception):
    """A piece of work did not fit into memory.

    ``tokens`` is the number of padded tokens of the forward that failed, or None when the prompts
    themselves did not fit, before any row was run. ``divisible`` is True if that forward can be
    cut.
    """

    def __init__(self, tokens: int | None = None, divisible: bool = False) -> None:
        super().__init__(tokens, divisible)
        self.tokens = tokens
        self.divisible = divisible


def ran_out(error: BaseException) -> bool:
    """Tell whether an error means that the device's or the machine's memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def needs_room(tokens: int | None = None, divisible: bool = False) -> Iterator[None]:
    """Turn errors inside the block that mean that memory ran out into ``NoRoom``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise NoRoom(tokens, divisible) from None


@dataclass
class Room:
    """The sizes that fit into memory, as far as they are known."""

    tokens: int | None = None
    """Maximum number of padded tokens in a forward; None as long as no limit is known."""
    prompts: int | None = None
    """Maximum number of prompts in a pack; None as long as no limit is known."""
    note: str = field(default="", init=False)
    """A text for users that says how the work was cut; empty if it was not cut."""

    def __post_init__(self) -> None:
        self._given = self.tokens

    def each(
        self, count: int, work: Callable[[Sequence[int]], Sequence[Result]]
    ) -> list[Result | None]:
        """Call ``work`` on the places 0 to count - 1, as many at a time as fit.

        Returns one result for each place, None for a place that does not fit even alone with one
        row per forward. When memory runs out, ``work`` must undo what it did and raise NoRoom; it
        is then called again with smaller limits.
        """
        found: list[Result | None] = []
        while len(found) < count:
            places = range(len(found), min(count, len(found) + (self.prompts or count)))
            try:
                found.extend(work(places))
                continue
            except NoRoom as error:
                # Keep no reference to the error: its frames hold the tensors that must be freed.
                tokens, divisible = error.tokens, error.divisible
            release()
            if not self._shrink(tokens if divisible else None, len(places)):
                found.append(None)
                self._forget()
        return found

    def _shrink(self, tokens: int | None, prompts: int) -> bool:
        """Halve the forward, or the pack if the forward can't be cut.

        Returns False when neither can be cut.
        """
        if tokens is not None:
            self.tokens = tokens // 2
        elif prompts > 1:
            self.prompts = -(-prompts // 2)
        else:
            return False
        parts = [f"forwards of at most {self.tokens} tokens"] if self.tokens != self._given else []
        parts += [f"{self.prompts} trials at a time"] if self.prompts else []
        self.note = "ran out of memory and went on with " + " and ".join(parts)
        return True

    def _forget(self) -> None:
        """Reset the limits: one trial's failure says nothing about the others."""
        self.tokens, self.prompts, self.note = self._given, None, ""


def release() -> None:
    """Free memory that is no longer referenced, also in the accelerator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
