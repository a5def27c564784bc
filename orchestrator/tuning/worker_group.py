"""Workers that train every step together, each on its part of the rows.

All of them seat the same trials and make the same updates. The engine asks the same of a worker alone and of many: a
``Group`` by itself is a worker alone, for which it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.models.decoding import DecodingState
from orchestrator.tuning.out_of_memory import NoRoom, release

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""The longest wait for another worker: a whole group idles for as long as others still train. That a worker died is
noticed by Ray Train, which starts its group again."""

FITS, INDIVISIBLE = (
    0,
    -1,
)  # what a worker notes; else the padded tokens of the forward that did not fit


class Group:
    """A worker alone."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this worker speaks for the group."""
        return self.rank == 0

    def share(self, places: Sequence[int]) -> Sequence[int]:
        """This worker's part of a forward's rows; none where there are fewer rows than workers."""
        return places

    def summed(
        self, parameters: Sequence[nn.Parameter], losses: int, work: Callable[[], Sequence[float]]
    ) -> list[float]:
        """``work`` leaves this worker's gradients on the parameters and returns its part of so many losses; afterwards
        both are the group's. NoRoom on every worker when memory ran out on any."""
        return list(work())

    def together(self, work: Callable[[], T]) -> T:
        """This worker's ``work``. NoRoom on every worker when memory ran out on any."""
        return work()

    def agree(self) -> bool:
        """Wait for the others. NoRoom on every worker when memory ran out on any."""
        return False

    def gathered(self, value: T) -> list[T]:
        """Every worker's value, by rank."""
        return [value]

    def led(self, work: Callable[[], T]) -> T:
        """What ``work`` gives the worker that leads; the others wait for it."""
        return work()

    def decoded(self, state: DecodingState, decode: Callable[[DecodingState], T]) -> T:
        """``decode`` of this worker's rows, whose forwards may be fewer than another's."""
        return decode(state)


class Agreed(NoRoom):
    """Memory that ran out, and every worker knows."""


class Workers(Group):
    """The workers of torch's process group.

    ``in_step``: the frozen weights are sharded among the workers, so that each forward needs all of them. Whoever runs
    out of memory then has to say so before the others wait for it in the next one.
    """

    def __init__(self, device: torch.device, in_step: bool = False) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._in_step = in_step
        # Notes and Python's objects go from one machine's memory to the other's, wherever the gradients are.
        self._hosts = (
            None
            if dist.get_backend() == "gloo"
            else dist.new_group(backend="gloo", timeout=PATIENCE)
        )

    def share(self, places: Sequence[int]) -> Sequence[int]:
        return places[self.rank :: self.size]

    def summed(
        self, parameters: Sequence[nn.Parameter], losses: int, work: Callable[[], Sequence[float]]
    ) -> list[float]:
        """One all-reduce of one tensor: the gradients, the losses, and a note of each worker."""
        found, note = self._attempt(work)
        if self._in_step:
            self.agree(note)
        if found is None:
            release()
        own = torch.zeros(losses) if found is None else torch.tensor(list(found))
        pieces = [_flat_gradient(param, found is None) for param in parameters]
        flat = torch.cat([*pieces, own.to(self._device), self._notes(note).to(self._device)])
        dist.all_reduce(flat)
        *grads, summed, notes = flat.split(
            [*(param.numel() for param in parameters), losses, self.size]
        )
        _raise_noted(notes.tolist())
        for param, grad in zip(parameters, grads, strict=True):
            if (
                param.grad is not None
            ):  # the same ones everywhere, since every worker runs all prompts
                param.grad = grad.view_as(param)
        return list(summed.tolist())

    def together(self, work: Callable[[], T]) -> T:
        found, note = self._attempt(work)
        self.agree(note)
        return found  # type: ignore[return-value]  # None only where agree raises, or where work says so

    @staticmethod
    def _attempt(work: Callable[[], T]) -> tuple[T | None, int]:
        try:
            return work(), FITS
        except Agreed:
            raise
        except NoRoom as error:
            return None, error.tokens if error.divisible and error.tokens else INDIVISIBLE

    def agree(self, note: int = FITS, going: bool = False) -> bool:
        """Exchange notes: Agreed when any worker has run out of memory; else whether any is still ``going``."""
        notes = torch.cat([self._notes(note), torch.tensor([float(going)])])
        dist.all_reduce(notes, group=self._hosts)
        *noted, others = map(float, notes.tolist())
        _raise_noted(noted)
        return others > 0

    def _notes(self, note: int) -> Tensor:
        """[W] float32, which holds counts up to 16 million exactly; the others' are added to it."""
        notes = torch.zeros(self.size)
        notes[self.rank] = note
        return notes

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def led(self, work: Callable[[], T]) -> T:
        box: list[Any] = [work() if self.leads else None]
        dist.broadcast_object_list(box, src=0, group=self._hosts, device=torch.device("cpu"))
        led: T = box[0]
        return led

    def decoded(self, state: DecodingState, decode: Callable[[DecodingState], T]) -> T:
        """Rows of one worker may end sooner than another's; it then goes on with a row that nobody reads."""
        if not self._in_step:
            return decode(state)
        first = torch.zeros(1, dtype=torch.long, device=state.logits.device)
        idle = state.select(first)
        done = decode(_InStep(state, self))
        while self.agree():
            idle = idle.extend(first)
        return done


@dataclass
class _InStep:
    """Rows that are extended when the other workers' are."""

    state: DecodingState
    group: Workers

    @property
    def logits(self) -> Tensor:
        return self.state.logits

    def select(self, rows: Tensor) -> _InStep:
        return _InStep(self.state.select(rows), self.group)

    def extend(self, ids: Tensor) -> _InStep:
        self.group.agree(going=True)
        return _InStep(self.state.extend(ids), self.group)

    def join(self, other: _InStep) -> None:
        """No rows come in between: those of an evaluation begin together."""


def joined_group(device: torch.device, in_step: bool = False) -> Group:
    """The group that this process is in: its workers where it has several."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Workers(device, in_step) if several else Group()


def _flat_gradient(param: nn.Parameter, dropped: bool) -> Tensor:
    if dropped or param.grad is None:
        return torch.zeros(param.numel(), device=param.device)
    return param.grad.reshape(-1)


def _raise_noted(notes: Sequence[float]) -> None:
    """A forward that can be cut is cut first; where it was not that, the pack is."""
    if not any(notes):
        return
    tokens = [int(note) for note in notes if note > FITS]
    raise Agreed(min(tokens), divisible=True) if tokens else Agreed()
