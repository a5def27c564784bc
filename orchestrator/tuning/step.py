"""One packed step: losses and gradients of K trials from shared forwards, each as if it were alone.

Each trial's loss is the negative log-likelihood of the target tokens (end token included) of its own rows, by default
their mean. The sum of the K losses is differentiated; a trial's rows see no prompt but its own, so its gradient is its
own too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.data.batches import length_groups
from orchestrator.data.encoding import Encoded
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors, stack_prepared
from orchestrator.models.scoring import target_log_probs
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.worker_group import Group

Reduction = Literal["token_mean", "sum_per_row", "sum"]


@dataclass(frozen=True)
class Limits:
    """How a packed batch is cut into forwards; changes time and memory, never the result."""

    forward_overhead: int = 128
    """Cost of one more forward, in padded tokens."""
    max_tokens: int | None = None
    """Padded tokens of one forward at most; None is no limit."""
    max_rows: int | None = None
    """Rows of one forward at most, or of those that run side by side; None is no limit."""

    def rows_of(self, threads: Threads) -> int | None:
        """Rows of each thread's forward at most."""
        return self.max_rows and max(1, self.max_rows // threads.ways)


@dataclass(frozen=True)
class Packed:
    """Rows of K trials in one list: ``row`` places in the split, ``trial`` 0..K-1, ``weight`` of its target tokens."""

    row: list[int]
    trial: list[int]
    weight: list[float]


def pack(
    rows_of_trials: Sequence[Sequence[int]], split: Encoded, reduction: Reduction = "token_mean"
) -> Packed:
    """Concatenate the trials' rows; the weights make a trial's loss the mean over its target tokens, the mean over its
    rows of each row's sum, or the sum."""
    row: list[int] = []
    trial: list[int] = []
    weight: list[float] = []
    for place, rows in enumerate(rows_of_trials):
        tokens = sum(len(split.targets[number]) for number in rows)
        row.extend(rows)
        trial.extend([place] * len(rows))
        whole = {"token_mean": tokens, "sum_per_row": len(rows), "sum": 1}[reduction]
        weight.extend([1.0 / whole] * len(rows))
    return Packed(row, trial, weight)


def packed_gradients(
    backbone: Backbone,
    prompts: Sequence[Tensor | PromptTensors] | None,
    rows_of_trials: Sequence[Sequence[int]],
    split: Encoded,
    limits: Limits = Limits(),
    reduction: Reduction = "token_mean",
    group: Group = Group(),
    threads: Threads = Threads(),
    learned: Sequence[Tensor] = (),
) -> list[float]:
    """Add each trial's gradient to what its prompt was computed from (``.grad``); returns the K losses.

    ``prompts=None`` is the model without a prompt; ``learned`` are then the tensors in it that get the gradients.

    The prompts run once. Rows are grouped by length into forwards; each leaves its gradient on the prompts' keys and
    values, and one backward at the end carries the sum to the prompts. Raises NoRoom when memory runs out; gradients
    may then have been added to some of the prompts.

    A worker of a ``group`` runs its share of each forward's rows, and gives its part of gradients and losses. Its
    ``threads`` deal that share out among them once more, and the prompts too.
    """
    packed = pack(rows_of_trials, split, reduction)
    shared = [] if prompts is None else Prompts.prepare(backbone, prompts, threads)
    with needs_room():
        leaf = (
            None
            if prompts is None
            else stack_prepared([own.prepared.detach() for own in shared]).leaf()
        )
    lengths = [split.lengths[number] for number in packed.row]
    cut = (limits.forward_overhead, limits.max_tokens, limits.rows_of(threads))
    groups = length_groups(lengths, *cut, ways=group.size * threads.ways)
    wanted = learned if leaf is None else leaf.tensors
    batch = Batch(backbone, split, packed, lengths, leaf, wanted, alone=threads.ways == 1)
    gradients, losses = zip(
        *threads.each(
            lambda part: batch.run(_dealt(groups, group, threads, part), len(rows_of_trials))
        ),
        strict=True,
    )
    for tensor, parts in zip(batch.wanted, zip(*gradients, strict=True), strict=True):
        _add(tensor, parts)
    if leaf is not None:
        threads.each(lambda part: shared[part].backward_from(leaf) if part < len(shared) else None)
    return list(torch.stack(losses).sum(0).tolist())


@dataclass(frozen=True)
class Prompts:
    """Some of a step's prompts, made ready by one thread; ``first`` is the place of the first of them."""

    prepared: PreparedPrompts
    first: int

    @classmethod
    def prepare(
        cls, backbone: Backbone, prompts: Sequence[Tensor | PromptTensors], threads: Threads
    ) -> list[Prompts]:
        """All prompts, in their order, each thread's its own; no more threads than prompts."""
        parts = min(threads.ways, len(prompts))
        ends = [len(prompts) * part // parts for part in range(parts + 1)]

        def own(part: int) -> Prompts | None:
            if part >= parts:
                return None
            with needs_room():
                return cls(backbone.prepare(prompts[ends[part] : ends[part + 1]]), ends[part])

        return [one for one in threads.each(own) if one is not None]

    def backward_from(self, leaf: PreparedPrompts) -> None:
        with needs_room():
            self.prepared.backward_from(leaf, self.first)


@dataclass(frozen=True)
class Share:
    """Rows of one forward. ``counts`` is false where they are another worker's, since all run as many forwards."""

    places: Sequence[int]
    counts: bool = True


def _dealt(
    groups: Sequence[Sequence[int]], group: Group, threads: Threads, part: int
) -> list[Share]:
    """This thread's rows of each forward."""
    found = []
    for places in groups:
        own = threads.share(group.share(places))[part]
        if own:
            found.append(Share(own))
        elif threads.ways == 1:
            found.append(Share(places[:1], counts=False))
    return found


@dataclass(frozen=True)
class Batch:
    """A step's rows; gradients are asked of ``wanted``."""

    backbone: Backbone
    split: Encoded
    packed: Packed
    lengths: Sequence[int]
    prompts: PreparedPrompts | None
    wanted: Sequence[Tensor]
    alone: bool
    """Whether one forward runs at a time. Where several do, even those of one row each leave something to cut."""

    def run(self, shares: Sequence[Share], trials: int) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of ``wanted``, None where nothing depends on one, and losses [K]; of these forwards."""
        losses = torch.zeros(trials, device=self.backbone.device)
        summed: list[Tensor | None] = [None] * len(self.wanted)
        for share in shares:
            tokens = len(share.places) * max(self.lengths[place] for place in share.places)
            with needs_room(tokens, divisible=len(share.places) > 1 or not self.alone):
                for place, gradient in enumerate(self._forward_backward(share, losses)):
                    held = summed[place]
                    summed[place] = (
                        gradient
                        if held is None
                        else held
                        if gradient is None
                        else held.add_(gradient)
                    )
        return summed, losses

    def _forward_backward(self, share: Share, losses: Tensor) -> Sequence[Tensor | None]:
        """Gradients of one forward's rows; its losses are added to [K], if it counts."""
        numbers = [self.packed.row[place] for place in share.places]
        trial = [self.packed.trial[place] for place in share.places]
        logits, targets = self.backbone.teacher_forced(
            self.prompts,
            [self.split.inputs[n] for n in numbers],
            [self.split.targets[n] for n in numbers],
            trial,
        )
        device = self.backbone.device
        weight = torch.tensor(
            [self.packed.weight[place] * share.counts for place in share.places], device=device
        )
        row_losses = -target_log_probs(logits, targets).sum(1) * weight
        losses.index_add_(0, torch.tensor(trial, device=device), row_losses.detach())
        return torch.autograd.grad(row_losses.sum(), self.wanted, allow_unused=True)


def _add(tensor: Tensor, gradients: Sequence[Tensor | None]) -> None:
    """Add the threads' gradients to the tensor's, in their order, so that a search repeats itself."""
    for gradient in gradients:
        if gradient is not None:
            tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
