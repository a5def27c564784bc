"""Memory that runs out: work is cut into smaller pieces and done again, with the same result.

A forward is cut first (fewer padded tokens, more forwards), then the pack (fewer prompts at a time). What was learned
is kept: the next step starts with pieces that fitted.
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
"""How torch's allocators and CUDA's libraries say it, where the error has no type of its own."""


class NoRoom(Exception):
    """A piece of work did not fit.

    ``tokens``: padded tokens of the forward that failed, None when it was the prompts themselves, before any row.
    ``divisible``: whether that forward can be cut.
    """

    def __init__(self, tokens: int | None = None, divisible: bool = False) -> None:
        super().__init__(tokens, divisible)
        self.tokens = tokens
        self.divisible = divisible


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the device's or the machine's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def needs_room(tokens: int | None = None, divisible: bool = False) -> Iterator[None]:
    """Turns an error that says that memory ran out into ``NoRoom``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise NoRoom(tokens, divisible) from None


@dataclass
class Room:
    """What fits: ``tokens`` padded tokens of a forward and ``prompts`` of a pack; None where no limit was met."""

    tokens: int | None = None
    prompts: int | None = None
    note: str = field(default="", init=False)
    """What was given up, for people; empty while nothing was."""

    def __post_init__(self) -> None:
        self._given = self.tokens

    def each(
        self, count: int, work: Callable[[Sequence[int]], Sequence[Result]]
    ) -> list[Result | None]:
        """``work`` on the places 0..count-1, as many at a time as fit; a result each.

        None for a place that does not fit even alone with a row a forward. ``work`` raises NoRoom, having undone what
        it did, and is called again with less.
        """
        found: list[Result | None] = []
        while len(found) < count:
            places = range(len(found), min(count, len(found) + (self.prompts or count)))
            try:
                found.extend(work(places))
                continue
            except NoRoom as error:
                # Nothing of the error may outlive this clause: its frames hold the tensors that are in the way.
                tokens, divisible = error.tokens, error.divisible
            release()
            if not self._shrink(tokens if divisible else None, len(places)):
                found.append(None)
                self._forget()
        return found

    def _shrink(self, tokens: int | None, prompts: int) -> bool:
        """Halve the forward, or the pack where the forward is not what can be cut; False when neither can."""
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
        """Who did not fit at all says nothing about the others."""
        self.tokens, self.prompts, self.note = self._given, None, ""


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
