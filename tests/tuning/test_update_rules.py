"""Update rules against torch's optimizers, and against T5X's Adafactor written out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.job.spec import TrainSpec
from orchestrator.tuning.update_rules import (
    Adafactor,
    AdamW,
    Batch,
    Sgd,
    UpdateRule,
    fresh_state,
    update_rule,
)

SHAPES = [(4, 6), (1, 6), (7,)]  # the shapes of three parameters that are updated together
RATES = [0.3, 0.01, 2.0]


def t5x_adafactor(
    start: np.ndarray, gradients: Sequence[np.ndarray], rates: Sequence[float], weight_decay: float
) -> np.ndarray:
    """Apply T5X's Adafactor to one parameter: not factored, no momentum, no parameter scaling.

    Written from its algorithm: t counts from 1; v = (1 - t^-0.8) v + t^-0.8 (g^2 + 1e-30); y = g /
    sqrt(v), divided by its root mean square where that is above 1; the parameter is reduced by
    weight decay times itself and by rate times y.
    """
    value, v = start.astype(np.float64), np.zeros(start.shape)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        old_share = 1.0 - np.power(float(t), -0.8)
        v = old_share * v + (1.0 - old_share) * (np.square(g) + 1e-30)
        y = g / np.sqrt(v)
        y = y / np.maximum(1.0, np.sqrt(np.square(y).mean()) / 1.0)
        value = value - weight_decay * value - rate * y
    return value


def gradients(shape: tuple[int, ...], scale: float = 1.0, count: int = 8) -> list[np.ndarray]:
    """Return gradients of very different sizes, with a burst that has to be clipped."""
    random = np.random.default_rng(0)
    sizes = [scale * (50 if step == 4 else 1) for step in range(count)]
    return [
        size * random.normal(size=shape) * 10.0 ** random.integers(-3, 2, size=shape)
        for size in sizes
    ]


def starts(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = np.random.default_rng(1)
    return [torch.from_numpy(random.normal(size=shape)).to(dtype) for shape in SHAPES]


def updated(
    rule: UpdateRule, given: list[list[np.ndarray]], rates: list[list[float]]
) -> list[torch.Tensor]:
    """Return the parameters after joint updates with all the given gradients."""
    params = starts()
    states = [fresh_state(rule, param) for param in params]
    for step in range(len(given[0])):
        grads = [torch.from_numpy(of_param[step].copy()) for of_param in given]
        rule.update(Batch(params, grads, states, [of_param[step] for of_param in rates]))
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_adafactor_is_t5x(weight_decay: float, scale: float) -> None:
    """Adafactor agrees with T5X over eight steps with clipping, weight decay and changing rates."""
    given = [gradients(shape, scale) for shape in SHAPES]
    rates = [[rate / (1 + step) for step in range(8)] for rate in RATES]
    got = updated(Adafactor(weight_decay), given, rates)
    for param, start, grads, rate in zip(got, starts(), given, rates, strict=True):
        wanted = t5x_adafactor(start.numpy(), grads, rate, weight_decay)
        np.testing.assert_allclose(param.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_the_burst_is_clipped() -> None:
    """The gradients above are clipped at some steps and not at others."""
    sizes, v = [], np.zeros(SHAPES[0])
    for t, g in enumerate(gradients(SHAPES[0]), start=1):
        v = (1 - t**-0.8) * v + t**-0.8 * (g * g)
        sizes.append(float(np.sqrt(np.mean((g / np.sqrt(v)) ** 2))))
    assert max(sizes) > 1.2 and min(sizes) < 0.9


def test_adafactor_survives_a_gradient_of_zero() -> None:
    """A first gradient of all zeros changes nothing and divides by nothing, also in float32."""
    rule, param = Adafactor(0.0), torch.ones(3, 2)
    rule.update(Batch([param], [torch.zeros(3, 2)], [fresh_state(rule, param)], [0.3]))
    assert torch.equal(param, torch.ones(3, 2))


Make = Callable[[nn.Parameter, float], torch.optim.Optimizer]
TORCHS: list[tuple[UpdateRule, Make]] = [
    (
        AdamW(0.0, (0.9, 0.999)),
        lambda param, rate: torch.optim.AdamW([param], lr=rate, weight_decay=0.0),
    ),
    (
        AdamW(0.1, (0.5, 0.9)),
        lambda param, rate: torch.optim.AdamW([param], lr=rate, betas=(0.5, 0.9), weight_decay=0.1),
    ),
    (Sgd(0.0, 0.0), lambda param, rate: torch.optim.SGD([param], lr=rate)),
    (Sgd(0.1, 0.0), lambda param, rate: torch.optim.SGD([param], lr=rate, weight_decay=0.1)),
    (
        Sgd(0.1, 0.9),
        lambda param, rate: torch.optim.SGD([param], lr=rate, momentum=0.9, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "make"), TORCHS, ids=lambda value: str(value) if hasattr(value, "keys") else ""
)
def test_adamw_and_sgd_are_torchs_to_the_bit(
    rule: UpdateRule, make: Make, dtype: torch.dtype
) -> None:
    """Joint updates with separate learning rates equal torch's updates of each parameter."""
    params = starts(dtype)
    states = [fresh_state(rule, param) for param in params]
    theirs = [nn.Parameter(start) for start in starts(dtype)]
    optimizers = [make(param, rate) for param, rate in zip(theirs, RATES, strict=True)]
    given = [gradients(shape) for shape in SHAPES]
    for step in range(8):
        grads = [torch.from_numpy(of_param[step]).to(dtype) for of_param in given]
        for param, optimizer, grad in zip(theirs, optimizers, grads, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        rule.update(Batch(params, grads, states, RATES))
    for param, other in zip(params, theirs, strict=True):
        assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("train", "rule"),
    [
        (TrainSpec(), AdamW(0.0, (0.9, 0.999))),
        (TrainSpec(weight_decay=0.1, betas=(0.8, 0.9)), AdamW(0.1, (0.8, 0.9))),
        (TrainSpec(optimizer="adafactor", weight_decay=1e-5), Adafactor(1e-5)),
        (TrainSpec(optimizer="sgd"), Sgd(0.0, 0.0)),
        (TrainSpec(optimizer="sgd", momentum=0.9, weight_decay=0.2), Sgd(0.2, 0.9)),
    ],
)
def test_the_spec_chooses(train: TrainSpec, rule: UpdateRule) -> None:
    """The rule has the spec's settings; unset betas and momentum are torch's defaults."""
    assert update_rule(train) == rule
