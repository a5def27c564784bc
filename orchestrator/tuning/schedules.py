"""Learning rate schedules as pure functions of the step, so resuming needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.job.spec import TrainSpec


def factor(train: TrainSpec, step: int) -> float:
    """Compute the factor of the peak learning rate at 0-based ``step``, between 0 and 1.

    A linear warmup over ``train.warmup_steps`` is followed by ``train.schedule``. Constant, linear
    and cosine equal those of transformers step for step (T5X's warmup is the same). The first step
    of the warmup has factor 0, and the first step after it has factor 1. Linear and cosine reach 0
    at ``train.steps``, one past the last step. Exponential is torch's ExponentialLR, stepped every
    ``train.decay_steps`` after the warmup (P-tuning, Liu et al. 2021: 0.98 per epoch).
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
    assert train.decay_rate is not None and train.decay_steps is not None  # required by the spec
    return float(train.decay_rate ** (since_warmup // train.decay_steps))


COURSES: dict[str, Callable[[TrainSpec, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
