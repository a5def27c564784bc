"""Metrics of the user's own: functions of predictions, references and scores.

Shapes: B rows, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.job.metrics import MetricFailed, custom_value
from orchestrator.tuning.worker_group import Group


@dataclass(frozen=True)
class Judgement:
    """The arguments of a metric, for one prompt and all rows in their order."""

    predictions: Sequence[Any]
    """Each row's likeliest label, as the verbalizer writes it, or its generated text."""
    references: Sequence[Any]
    """Each row's right label, or the list of its reference texts."""
    scores: NDArray[np.float64] | None
    """Probability [B, C] of each label, in the verbalizer's order; None for generated texts."""


def custom_values(name: str, judgements: Sequence[Judgement], group: Group) -> list[float]:
    """Compute a metric for each judgement, on the leading worker of the group.

    A prompt whose scores are not finite has diverged, and gets NaN. Raises MetricFailed on every
    worker if the function fails.
    """

    def attempt() -> tuple[list[float], MetricFailed | None]:
        try:
            return [_value(name, judgement) for judgement in judgements], None
        except MetricFailed as failure:
            return [], failure

    values, failure = group.led(attempt)
    if failure is not None:
        raise failure
    return values


def _value(name: str, judgement: Judgement) -> float:
    scores = judgement.scores
    if scores is not None and not np.isfinite(scores).all():
        return math.nan
    return custom_value(name, judgement.predictions, judgement.references, scores)
