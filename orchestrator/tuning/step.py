"""The packed training step: losses and gradients of K trials from shared forwards.

Each trial gets the result that it would get alone. Its loss is the negative log-likelihood of the
target tokens (end token included) of its own rows; by default, the mean over those tokens. The
sum of the K losses is differentiated. A trial's rows see only that trial's prompt, so the sum's
gradient with respect to a prompt is the gradient of that trial's own loss.
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
from orchestrator.tuning.forwards import Share, SharedForwards
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.worker_group import Group

Reduction = Literal["token_mean", "sum_per_row", "sum"]


@dataclass(frozen=True)
class Limits:
    """Limits on how a packed batch is cut into forwards.

    They change time and memory, never the result.
    """

    forward_overhead: int = 128
    """Cost of one more forward, in padded tokens."""
    max_tokens: int | None = None
    """Maximum number of padded tokens in one forward; None means no limit."""
    max_rows: int | None = None
    """Maximum number of rows in one forward, or in all forwards that run side by side.

    None means no limit."""

    def rows_of(self, threads: Threads) -> int | None:
        """Return the maximum number of rows in each thread's forward; None means no limit."""
        return self.max_rows and max(1, self.max_rows // threads.ways)


@dataclass(frozen=True)
class Packed:
    """The rows of K trials, concatenated into parallel lists."""

    row: list[int]
    """Index of each row in the split."""
    trial: list[int]
    """The trial that each row belongs to, 0 to K-1."""
    weight: list[float]
    """Weight of each target token of the row in its trial's loss."""


def pack(
    rows_of_trials: Sequence[Sequence[int]],
    split: Encoded,
    reduction: Reduction = "token_mean",
    row_weights: Sequence[float] | None = None,
) -> Packed:
    """Concatenate the trials' rows and weight them for the reduction.

    The weighted sum is the mean over the trial's target tokens (``token_mean``), the mean over its
    rows of each row's sum (``sum_per_row``), or the plain sum (``sum``). With ``row_weights``, one
    for each row of the split, the means are weighted means and the sum is a weighted sum.
    """
    row: list[int] = []
    trial: list[int] = []
    weight: list[float] = []
    for place, rows in enumerate(rows_of_trials):
        own = [1.0 if row_weights is None else row_weights[number] for number in rows]
        lengths = [len(split.targets[number]) for number in rows]
        tokens = sum(one * length for one, length in zip(own, lengths, strict=True))
        row.extend(rows)
        trial.extend([place] * len(rows))
        whole = {"token_mean": tokens, "sum_per_row": sum(own), "sum": 1}[reduction]
        weight.extend(one / whole for one in own)
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
    row_weights: Sequence[float] | None = None,
) -> list[float]:
    """Compute the K trials' losses and add the gradients to the leaves that the prompts come from.

    ``prompts=None`` runs the model without a prompt. The gradients then go to ``learned``: tensors
    inside the model. ``row_weights`` are as in ``pack``.

    The model runs over the prompts once. Rows are grouped by length into forwards. Each forward
    leaves its gradient on the prompts' keys and values, and one backward at the end carries the sum
    to the prompts. Raises NoRoom when memory runs out; gradients may then have been added to some
    of the prompts.

    A worker of a ``group`` runs its share of each forward's rows and returns its part of the losses
    and gradients. Its ``threads`` divide that share, and the prompts, among themselves.
    """
    packed = pack(rows_of_trials, split, reduction, row_weights)
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
    step = PackedStep(backbone, split, packed, leaf, wanted, trials=len(rows_of_trials))
    sums = SharedForwards(groups, lengths, group, threads).run(step.no_sums, step.add)
    for place, tensor in enumerate(wanted):
        _add(tensor, [of_thread.gradients[place] for of_thread in sums])
    if leaf is not None:
        threads.each(lambda part: shared[part].backward_from(leaf) if part < len(shared) else None)
    return list(torch.stack([of_thread.losses for of_thread in sums]).sum(0).tolist())


@dataclass(frozen=True)
class Prompts:
    """Consecutive prompts of a step, prepared by one thread."""

    prepared: PreparedPrompts
    first: int
    """Index of the first of them among all prompts of the step."""

    @classmethod
    def prepare(
        cls, backbone: Backbone, prompts: Sequence[Tensor | PromptTensors], threads: Threads
    ) -> list[Prompts]:
        """Prepare all prompts in order, divided among the threads; a thread may get none."""
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


@dataclass
class Sums:
    """Sums over the forwards that one thread has run."""

    losses: Tensor
    """[K]"""
    gradients: list[Tensor | None]
    """One for each wanted tensor; None as long as no forward depends on that tensor."""


@dataclass(frozen=True)
class PackedStep:
    """The rows of a step and the model that they run through."""

    backbone: Backbone
    split: Encoded
    packed: Packed
    prompts: PreparedPrompts | None
    wanted: Sequence[Tensor]
    """The tensors to compute gradients for."""
    trials: int

    def no_sums(self) -> Sums:
        """Return the sums over no forward."""
        losses = torch.zeros(self.trials, device=self.backbone.device)
        return Sums(losses, [None] * len(self.wanted))

    def add(self, share: Share, sums: Sums) -> None:
        """Run the rows of one forward; add their losses and gradients to the sums.

        A share that does not count adds zeros.
        """
        device = self.backbone.device
        trial = [self.packed.trial[place] for place in share.rows]
        row_losses = self.row_losses(share)
        sums.losses.index_add_(0, torch.tensor(trial, device=device), row_losses.detach())
        gradients = torch.autograd.grad(row_losses.sum(), self.wanted, allow_unused=True)
        for place, gradient in enumerate(gradients):
            sums.gradients[place] = _plus(sums.gradients[place], gradient)

    def row_losses(self, share: Share) -> Tensor:
        """Run the rows of one forward; return each row's weighted loss, with its graph."""
        numbers = [self.packed.row[place] for place in share.rows]
        trial = [self.packed.trial[place] for place in share.rows]
        logits, targets = self.backbone.teacher_forced(
            self.prompts,
            [self.split.inputs[n] for n in numbers],
            [self.split.targets[n] for n in numbers],
            trial,
        )
        weight = torch.tensor(
            [self.packed.weight[place] * share.counts for place in share.rows],
            device=self.backbone.device,
        )
        return -target_log_probs(logits, targets).sum(1) * weight


def _plus(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Add a gradient to a total, in place where there is one."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


def _add(tensor: Tensor, gradients: Sequence[Tensor | None]) -> None:
    """Add the threads' gradients to the tensor's.

    They are added in the order of the threads, so that a search is reproducible.
    """
    for gradient in gradients:
        tensor.grad = _plus(tensor.grad, gradient)
