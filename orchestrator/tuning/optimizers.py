"""Optimisers as torch has them, for loops that call ``step`` themselves; ``updater`` is the trials' own way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from orchestrator.spec import DEFAULT_BETAS, TrainSpec
from orchestrator.tuning import update_rules
from orchestrator.tuning.update_rules import Batch, fresh_state


class Adafactor(Optimizer):
    """``update_rules.Adafactor``, T5X's, in the form of a torch optimiser."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rule = update_rules.Adafactor(group["weight_decay"])
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = fresh_state(rule, param)
            states = [self.state[param] for param in params]
            rule.update(Batch(params, [param.grad for param in params], states, [group["lr"]] * len(params)))


def make_optimizer(parameters: Sequence[Tensor], learning_rate: float, train: TrainSpec) -> Optimizer:
    """The spec's optimiser over a trial's parameters, without schedule and clipping."""
    match train.optimizer:
        case "adamw":
            betas = train.betas or DEFAULT_BETAS
            return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=train.weight_decay)
        case "adafactor":
            return Adafactor(parameters, lr=learning_rate, weight_decay=train.weight_decay)
        case "sgd":
            momentum = train.momentum or 0.0
            return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=train.weight_decay)
