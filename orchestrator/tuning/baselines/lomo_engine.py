"""The tuning engine for LOMO, whose updates happen during the backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from orchestrator.tuning.baselines.engine import BaselineEngine
from orchestrator.tuning.baselines.lomo import Lomo, fused_update
from orchestrator.tuning.engine import Slot
from orchestrator.tuning.forwards import Share
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.schedules import factor
from orchestrator.tuning.step import PackedStep, pack


class LomoEngine(BaselineEngine):
    """An engine that runs all rows of a step in one forward, since no gradient can accumulate.

    A trial that runs out of memory has no smaller forward to try, and ends.
    """

    def _own_gradients(self, slots: Sequence[Slot], rows: Sequence[Sequence[int]]) -> list[float]:
        """Update the trial and return its loss; no gradients are left for the updater.

        The loss is nan when the gradient that is to be clipped is not finite.
        """
        (slot,), (numbers,) = slots, rows
        return self.threads.together().each(lambda _: self._updated(slot, numbers))

    def _updated(self, slot: Slot, numbers: Sequence[int]) -> float:
        """Update the trial from these training rows and return its loss before the update."""
        change, updater = slot.prompt, slot.updater
        assert isinstance(change, Lomo)
        rate = updater.learning_rate * factor(self.train, slot.step)
        with self._dropout(slot), change.applied(), needs_room():
            loss = self._loss(numbers)
            updated = fused_update(
                loss, updater.parameters, updater.rule, rate, self.train.clip_norm
            )
        return float(loss.detach()) if updated else math.nan

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        """Return the loss of these training rows, as a tensor to differentiate."""
        split, reduction = self.task.splits["train"], self.train.loss_reduction
        packed = pack([numbers], split, reduction, self._row_weights)
        step = PackedStep(self.backbone, split, packed, prompts=None, wanted=(), trials=1)
        return step.row_losses(Share(range(len(numbers)))).sum()

    def _stored_bytes(self, slot: Slot) -> int:
        return sum(tensor.nbytes for tensor in (slot.best or slot.prompt.named()).values())
