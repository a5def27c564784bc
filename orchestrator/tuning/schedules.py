"""Learning rate schedules as pure functions of the step: a resumed trial needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.job.spec import TrainSpec


def factor(train: TrainSpec, step: int) -> float:
    """What the peak learning rate is multiplied by at 0-based ``step``: 0 to 1.

    Linear warmup over ``train.warmup_steps``, then ``train.schedule``. Constant, linear and cosine are step for step
    those of transformers (T5X's warmup is the same): the first step of a warmup has factor 0, the first one after it 1;
    linear and cosine are at 0 at ``train.steps``, one past the last step. Exponential is torch's ExponentialLR, stepped
    every ``train.decay_steps`` after the warmup (P-tuning, Liu et al. 2021: 0.98 an epoch).
    """
    if step < train.warmup_steps:
        return step / train.warmup_steps
    return COURSES[train.schedule](train, min(step, train.steps) - train.warmup_steps)


def _constant(_train: TrainSpec, _since_warmup: int) -> float:
    return 1.0


def _linear(train: TrainSpec, since_warmup: int) -> float:
    length = train.steps - train.warmup_steps
    return (length - since_warmup) / length


def _cosine(train: TrainSpec, since_warmup: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * since_warmup / (train.steps - train.warmup_steps)))


def _exponential(train: TrainSpec, since_warmup: int) -> float:
    assert train.decay_rate is not None and train.decay_steps is not None  # the spec asks for both
    return float(train.decay_rate ** (since_warmup // train.decay_steps))


COURSES: dict[str, Callable[[TrainSpec, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
