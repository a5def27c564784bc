"""Optimisers of a soft prompt: AdamW, and Adafactor as T5X has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from orchestrator.spec import TrainSpec

DECAY_EXPONENT = 0.8  # second moment: 1 - t^-0.8
CLIPPING_THRESHOLD = 1.0
EPSILON = 1e-30


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) as Lester et al. use it through T5X.

    Fixed learning rate, no parameter scaling, no momentum, unfactored second moment (their prompt is not factored),
    update clipping at RMS 1; weight decay is subtracted as it stands, not times the learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group["lr"], group["weight_decay"])

    def _update(self, param: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[param]
        if not state:
            state["step"], state["second_moment"] = torch.tensor(0.0), torch.zeros_like(param)
        state["step"] += 1
        decay = 1.0 - float(state["step"]) ** -DECAY_EXPONENT
        state["second_moment"].mul_(decay).add_(grad.square() + EPSILON, alpha=1.0 - decay)
        update = grad * state["second_moment"].rsqrt()
        update /= (update.square().mean().sqrt() / CLIPPING_THRESHOLD).clamp(min=1.0)
        param.mul_(1.0 - weight_decay).sub_(update, alpha=lr)


def make_optimizer(prompt: Tensor, learning_rate: float, train: TrainSpec) -> Optimizer:
    """The spec's optimiser over one prompt [P, H]."""
    if train.optimizer == "adafactor":
        return Adafactor([prompt], lr=learning_rate, weight_decay=train.weight_decay)
    return torch.optim.AdamW([prompt], lr=learning_rate, weight_decay=train.weight_decay)
