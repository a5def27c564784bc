"""Torch's form of the optimisers: the same updates as an updater's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.spec import TrainSpec
from orchestrator.tuning.optimizers import Adafactor, make_optimizer
from orchestrator.tuning.updater import Updater


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "betas": (0.5, 0.9)},
        {"optimizer": "adafactor"},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9},
    ],
    ids=str,
)
def test_it_updates_as_an_updater_does(settings: dict[str, Any], weight_decay: float) -> None:
    """Without schedule and clipping, the spec's optimiser takes several parameters to the same bits."""
    train = TrainSpec.model_validate({"weight_decay": weight_decay, **settings})
    random = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=random) for shape in ((4, 6), (3,))]
    params = [nn.Parameter(start.clone()) for start in starts]
    updater = Updater([nn.Parameter(start.clone()) for start in starts], 0.05, train)
    optimizer = make_optimizer(params, 0.05, train)
    for step in range(6):
        for param, other in zip(params, updater.parameters, strict=True):
            param.grad = torch.randn(param.shape, generator=random)
            other.grad = param.grad.clone()
        optimizer.step()
        updater.apply(step)
    for param, other in zip(params, updater.parameters, strict=True):
        assert torch.equal(param, other)


def test_adafactor_passes_over_what_has_no_gradient() -> None:
    """A parameter without a gradient stays and has no state."""
    parameter, idle = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([parameter, idle], lr=0.3)
    parameter.grad = torch.ones(4, 6)
    optimizer.step()
    assert not torch.equal(parameter.data, torch.ones(4, 6)) and torch.equal(idle.data, torch.ones(3))
    assert idle not in optimizer.state
