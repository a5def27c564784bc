"""What the engine says of a trial, and what it can be asked to evaluate. Plain values: no torch, cheap to unpickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["steps", "patience", "diverged"]


@dataclass(frozen=True)
class Report:
    """One evaluation of one trial. ``ending`` says why the trial is over, None while it goes on.

    ``score`` is the best validation metric so far, by which trials are compared; the worst possible one before any.
    ``pending`` counts the reports of the same round that are handed on after this one.
    """

    trial: str
    step: int
    metrics: dict[str, float]
    train_loss: float
    best_step: int
    best_metrics: dict[str, float]
    score: float
    checkpoint: bytes
    ending: Ending | None = None
    pending: int = field(default=0, compare=False)


@dataclass(frozen=True)
class EvaluationJob:
    """A split to evaluate: with the best prompt in ``checkpoint``, else with a written ``instruction``, else bare."""

    split: str
    checkpoint: bytes | None = None
    instruction: str | None = None
