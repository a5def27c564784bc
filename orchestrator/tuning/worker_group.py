"""Groups of workers that train every step together, each on its part of the rows.

All workers of a group seat the same trials and make the same updates. ``Workers`` is a group of
several. The base class ``Group`` has the same interface for a single worker, at no cost, so the
engine does not distinguish the two.
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
"""The timeout for messages of other workers.

It is long because a group may idle for as long as other groups still train. A worker's death is
noticed by Ray Train instead, which restarts the worker's group."""

# The notes that workers exchange. Any other note is the number of padded tokens of the forward that
# did not fit.
FITS, INDIVISIBLE = 0, -1


class Group:
    """A group of a single worker."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """True for the worker that speaks for the group."""
        return self.rank == 0

    def share(self, places: Sequence[int]) -> Sequence[int]:
        """Return this worker's part of a forward's rows.

        The part may be empty if there are fewer rows than workers.
        """
        return places

    def summed(
        self, parameters: Sequence[nn.Parameter], losses: int, work: Callable[[], Sequence[float]]
    ) -> list[float]:
        """Run ``work`` and sum its gradients and losses over the group.

        ``work`` leaves this worker's gradients on the parameters and returns its part of the
        losses, of which there are ``losses``. Afterwards the parameters hold the group's gradients,
        and the group's losses are returned. Raises NoRoom on every worker when memory ran out on
        any of them.
        """
        return list(work())

    def together(self, work: Callable[[], T]) -> T:
        """Run this worker's ``work`` and wait for the others.

        Raises NoRoom on every worker when memory ran out on any of them.
        """
        return work()

    def agree(self) -> bool:
        """Wait for the others and tell whether any of them still has forwards to run.

        Raises NoRoom on every worker when memory ran out on any of them.
        """
        return False

    def gathered(self, value: T) -> list[T]:
        """Collect every worker's value, in order of rank."""
        return [value]

    def led(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the leading worker only and return its result on all workers."""
        return work()

    def decoded(self, state: DecodingState, decode: Callable[[DecodingState], T]) -> T:
        """Run ``decode`` on this worker's rows, which may need fewer forwards than another's."""
        return decode(state)


class Agreed(NoRoom):
    """Memory ran out, and every worker of the group knows it."""


class Workers(Group):
    """The workers of torch's process group.

    ``in_step`` is set when the frozen weights are sharded among the workers, so that each forward
    needs all of them. A worker that runs out of memory must then tell the others before they wait
    for it in the next forward.
    """

    def __init__(self, device: torch.device, in_step: bool = False) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._in_step = in_step
        # Notes and Python objects are exchanged in main memory, also if gradients are on a device.
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
        """Sum over the group with one all-reduce of a single tensor.

        The tensor holds the gradients, the losses and a note of each worker.
        """
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
            # Every worker runs all prompts, so the same parameters have gradients everywhere.
            if param.grad is not None:
                param.grad = grad.view_as(param)
        return list(summed.tolist())

    def together(self, work: Callable[[], T]) -> T:
        found, note = self._attempt(work)
        self.agree(note)
        return found  # type: ignore[return-value]  # None only if work returned it: agree raises

    @staticmethod
    def _attempt(work: Callable[[], T]) -> tuple[T | None, int]:
        try:
            return work(), FITS
        except Agreed:
            raise
        except NoRoom as error:
            return None, error.tokens if error.divisible and error.tokens else INDIVISIBLE

    def agree(self, note: int = FITS, going: bool = False) -> bool:
        """Exchange notes with the others and tell whether any worker is still ``going``.

        Raises Agreed when any worker has run out of memory.
        """
        notes = torch.cat([self._notes(note), torch.tensor([float(going)])])
        dist.all_reduce(notes, group=self._hosts)
        *noted, others = map(float, notes.tolist())
        _raise_noted(noted)
        return others > 0

    def _notes(self, note: int) -> Tensor:
        """Return a tensor [W] with this worker's note, to which those of the W workers are added.

        It is float32, which holds counts up to 16 million exactly.
        """
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
        """Run ``decode`` on this worker's rows, in step with the others if the model is sharded.

        A worker whose rows end sooner extends an unused row until the others have finished.
        """
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
    """A decoding state whose rows are extended at the same time as those of the other workers."""

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
        """Do nothing: rows of an evaluation all start together, so none join later."""


def joined_group(device: torch.device, in_step: bool = False) -> Group:
    """Return the group that this process is in, which may be a single worker."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Workers(device, in_step) if several else Group()


def _flat_gradient(param: nn.Parameter, dropped: bool) -> Tensor:
    if dropped or param.grad is None:
        return torch.zeros(param.numel(), device=param.device)
    return param.grad.reshape(-1)


def _raise_noted(notes: Sequence[float]) -> None:
    """Raise Agreed if any worker noted that memory ran out.

    A forward that can be cut comes first, with the fewest tokens noted. Otherwise the pack is cut.
    """
    if not any(notes):
        return
    tokens = [int(note) for note in notes if note > FITS]
    raise Agreed(min(tokens), divisible=True) if tokens else Agreed()
