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

from orchestrator.backbone import Backbone, PreparedPrompts, PromptTensors
from orchestrator.data.bucketing import length_groups
from orchestrator.data.encoding import Encoded
from orchestrator.scoring import target_log_probs
from orchestrator.tuning.group import Group
from orchestrator.tuning.room import needs_room

Reduction = Literal["token_mean", "sum_per_row", "sum"]


@dataclass(frozen=True)
class Limits:
    """How a packed batch is cut into forwards; changes time and memory, never the result."""

    forward_overhead: int = 32
    """Cost of one more forward, in padded tokens."""
    max_tokens: int | None = None
    """Padded tokens of one forward at most; None is no limit."""
    max_rows: int | None = None
    """Rows of one forward at most; None is no limit."""


@dataclass(frozen=True)
class Packed:
    """Rows of K trials in one list: ``row`` places in the split, ``trial`` 0..K-1, ``weight`` of its target tokens."""

    row: list[int]
    trial: list[int]
    weight: list[float]


def pack(rows_of_trials: Sequence[Sequence[int]], split: Encoded, reduction: Reduction = "token_mean") -> Packed:
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
) -> list[float]:
    """Add each trial's gradient to what its prompt was computed from (``.grad``); returns the K losses.

    ``prompts=None`` is the model without a prompt, whose own parameters then get the gradients.

    The prompts run once. Rows are grouped by length into forwards; each leaves its gradient on the prompts' keys and
    values, and one backward at the end carries the sum to the prompts. Raises NoRoom when memory runs out; gradients
    may then have been added to some of the prompts.

    A worker of a ``group`` runs its share of each forward's rows, and gives its part of gradients and losses.
    """
    packed = pack(rows_of_trials, split, reduction)
    with needs_room():
        prepared = None if prompts is None else backbone.prepare(prompts)
        leaf = None if prepared is None else prepared.leaf()
    losses = torch.zeros(len(rows_of_trials), device=backbone.device)
    lengths = [split.lengths[number] for number in packed.row]
    cut = (limits.forward_overhead, limits.max_tokens, limits.max_rows)
    for places in length_groups(lengths, *cut, ways=group.size):
        # All workers run as many forwards, if need be with a row that is another's and counts nothing here.
        own = group.share(places) or places[:1]
        tokens = len(own) * max(lengths[place] for place in own)
        with needs_room(tokens, divisible=len(own) > 1):
            _forward_backward(backbone, leaf, split, packed, own, losses, counts=bool(group.share(places)))
    if prepared is not None and leaf is not None:
        with needs_room():
            prepared.backward_from(leaf)
    return list(losses.tolist())


def _forward_backward(
    backbone: Backbone,
    leaf: PreparedPrompts | None,
    split: Encoded,
    packed: Packed,
    places: Sequence[int],
    losses: Tensor,
    counts: bool,
) -> None:
    """One forward of the rows at ``places``: gradients go to ``leaf``, losses are added to [K], if it ``counts``."""
    numbers = [packed.row[place] for place in places]
    trial = [packed.trial[place] for place in places]
    logits, targets = backbone.teacher_forced(
        leaf, [split.inputs[n] for n in numbers], [split.targets[n] for n in numbers], trial
    )
    weight = torch.tensor([packed.weight[place] * counts for place in places], device=backbone.device)
    row_losses = -target_log_probs(logits, targets).sum(1) * weight
    row_losses.sum().backward()
    losses.index_add_(0, torch.tensor(trial, device=backbone.device), row_losses.detach())
