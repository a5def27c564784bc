"""Schedules against those of transformers and torch, step by step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler
from transformers import get_scheduler

from orchestrator.job.spec import TrainSpec
from orchestrator.tuning.schedules import factor

STEPS = 37
DECAY = {"decay_rate": 0.9, "decay_steps": 5}
ALL: list[dict[str, Any]] = [
    {"schedule": "constant"},
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "exponential", **DECAY},
]


def spec(**values: Any) -> TrainSpec:
    return TrainSpec.model_validate({"steps": STEPS, "evaluate_every": 1, **values})


def factors(train: TrainSpec) -> list[float]:
    return [factor(train, step) for step in range(train.steps)]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


def rates(scheduler: LRScheduler, every: int = 1) -> list[float]:
    """Return the learning rates of STEPS steps; the scheduler advances every ``every`` steps."""
    found = []
    for step in range(1, STEPS + 1):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        if step % every == 0:
            scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5, STEPS - 1])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_transformers_has_the_same(ours: str, theirs: str, warmup: int) -> None:
    """Constant, linear and cosine agree with transformers at every step, for any warmup."""
    wanted = get_scheduler(theirs, sgd(), num_warmup_steps=warmup, num_training_steps=STEPS)
    assert factors(spec(schedule=ours, warmup_steps=warmup)) == pytest.approx(
        rates(wanted), rel=1e-12, abs=1e-15
    )


@pytest.mark.parametrize("every", [1, 5, 100])
def test_exponential_is_torchs(every: int) -> None:
    """ExponentialLR, advanced every decay_steps steps, gives the same learning rates."""
    train = spec(schedule="exponential", decay_rate=0.9, decay_steps=every)
    assert factors(train) == pytest.approx(rates(ExponentialLR(sgd(), gamma=0.9), every), rel=1e-12)


@pytest.mark.parametrize("course", ALL, ids=lambda course: course["schedule"])
def test_a_warmup_rises_evenly_and_ends_at_the_peak(course: dict[str, Any]) -> None:
    """The factor rises linearly from 0 to 1 at warmup_steps, with any schedule."""
    assert factors(spec(warmup_steps=4, **course))[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("course", ALL, ids=lambda course: course["schedule"])
def test_every_step_but_a_warmups_first_moves(course: dict[str, Any]) -> None:
    """Without a warmup the factors start at 1, never rise and stay above 0."""
    found = factors(spec(**course))
    assert found[0] == 1.0 and found[-1] > 0
    assert all(one >= other for one, other in pairwise(found))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_end_is_zero_and_stays_there(schedule: str) -> None:
    """The factor is 0 right after the last step and does not rise again."""
    train = spec(schedule=schedule, warmup_steps=3)
    assert [factor(train, STEPS + later) for later in (0, 1, STEPS)] == pytest.approx(
        [0, 0, 0], abs=1e-15
    )


def test_the_exponential_starts_after_the_warmup() -> None:
    """The first decay is decay_steps after the warmup's end."""
    train = spec(schedule="exponential", warmup_steps=3, **DECAY)
    assert [factor(train, step) for step in (3, 7, 8, 13)] == pytest.approx([1, 1, 0.9, 0.81])
