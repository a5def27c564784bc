"""Optimisers against updates written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.spec import TrainSpec
from orchestrator.tuning.optimizers import Adafactor, make_optimizer

SHAPE = (4, 6)


def t5x_adafactor(start: np.ndarray, gradients: list[np.ndarray], lr: float, weight_decay: float) -> np.ndarray:
    """T5X's Adafactor for one parameter: not factored, no momentum, no parameter scaling, fixed learning rate.

    Written from its formulas: second moment v with decay 1 - t^-0.8, update g / sqrt(v), clipped so that its root mean
    square is at most 1, times lr; the parameter shrinks by the weight decay, which the learning rate does not scale.
    """
    value, v = start.astype(np.float64), np.zeros(SHAPE)
    for t, g in enumerate(gradients, start=1):
        decay = 1 - t**-0.8
        v = decay * v + (1 - decay) * (g * g + 1e-30)
        update = g / np.sqrt(v)
        update = update / max(1.0, float(np.sqrt(np.mean(update**2))) / 1.0)
        value = (1 - weight_decay) * value - lr * update
    return value


def gradients(scale: float, count: int = 8) -> list[np.ndarray]:
    """Gradients of very different sizes, a burst among them, so that the clipping has something to do."""
    random = np.random.default_rng(0)
    sizes = [scale * (50 if step == 4 else 1) for step in range(count)]
    return [size * random.normal(size=SHAPE) * 10.0 ** random.integers(-3, 2, size=SHAPE) for size in sizes]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, given: list[np.ndarray]) -> np.ndarray:
    for gradient in given:
        parameter.grad = torch.from_numpy(gradient).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return parameter.detach().numpy()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_adafactor_is_t5x(weight_decay: float, scale: float) -> None:
    """Over several steps, with clipping and weight decay, the prompt is where T5X's update takes it."""
    start = np.random.default_rng(1).normal(size=SHAPE)
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    given = gradients(scale)
    got = stepped(Adafactor([parameter], lr=0.3, weight_decay=weight_decay), parameter, given)
    np.testing.assert_allclose(got, t5x_adafactor(start, given, 0.3, weight_decay), rtol=1e-9, atol=1e-12)


def test_the_burst_is_clipped() -> None:
    """The comparison above does clip: without it the result is another one."""
    given = gradients(1.0)
    v = np.zeros(SHAPE)
    sizes = []
    for t, g in enumerate(given, start=1):
        v = (1 - t**-0.8) * v + t**-0.8 * (g * g)
        sizes.append(float(np.sqrt(np.mean((g / np.sqrt(v)) ** 2))))
    assert max(sizes) > 1.2 and min(sizes) < 0.9


def test_adafactor_ignores_the_size_of_gradients_and_survives_zeros() -> None:
    """A gradient of zero moves nothing and divides by nothing; a parameter without a gradient stays."""
    parameter, idle = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([parameter, idle], lr=0.3)
    parameter.grad = torch.zeros(SHAPE)
    optimizer.step()
    assert torch.equal(parameter.data, torch.ones(SHAPE)) and torch.equal(idle.data, torch.ones(3))
    assert idle not in optimizer.state


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    """adamw is torch's own with its default moments; its weight decay is scaled by the learning rate."""
    start = torch.from_numpy(np.random.default_rng(1).normal(size=SHAPE))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    given = gradients(1.0)
    got = stepped(make_optimizer(ours, 0.05, TrainSpec(optimizer="adamw", weight_decay=weight_decay)), ours, given)
    wanted = stepped(torch.optim.AdamW([theirs], lr=0.05, weight_decay=weight_decay), theirs, given)
    np.testing.assert_array_equal(got, wanted)


def test_the_spec_chooses() -> None:
    """Learning rate, weight decay and optimiser come from the trial and the spec."""
    parameter = nn.Parameter(torch.ones(SHAPE))
    made = make_optimizer(parameter, 0.7, TrainSpec(optimizer="adafactor", weight_decay=1e-5))
    assert isinstance(made, Adafactor) and made.param_groups[0]["lr"] == 0.7
    assert made.param_groups[0]["weight_decay"] == 1e-5
    assert isinstance(make_optimizer(parameter, 0.7, TrainSpec()), torch.optim.AdamW)
