"""The Muon optimizer: momentum with orthogonalised updates, for a small transformer's matrices.

In the few hundred steps of training, AdamW alone does not learn to read a writer's mood; Muon does.
torch has its own implementation only from 2.9 on, and it updates one matrix at a time. Here
matrices of equal shape are updated together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of a quintic that, applied repeatedly, drives singular values between 0 and 1 to
# about 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, for matrices."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for same_shape in _by_shape(group["params"]):
                self._step(same_shape, group)

    def _step(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        gradient = torch.stack(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        state = self.state[parameters[0]]  # one buffer for the whole stack [N, rows, columns]
        average = state.setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]))
        size = group["lr"] * math.sqrt(max(1.0, update.shape[1] / update.shape[2]))
        for parameter, change in zip(parameters, update, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=size)


def _by_shape(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        shapes[parameter.shape].append(parameter)
    return list(shapes.values())


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices [N, rows, columns] with equal singular vectors and singular values near 1."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = QUINTIC
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
