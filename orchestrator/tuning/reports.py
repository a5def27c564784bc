"""What the engine says of a trial, and what it can be asked to evaluate. Plain values: no torch, cheap to unpickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.job.space import TrialSpec

Ending = Literal["steps", "patience", "evaluated", "diverged", "no_room"]
BROKEN: dict[Ending, str] = {"diverged": "diverged", "no_room": "out of memory"}
"""Endings of a trial that failed, in words."""


@dataclass(frozen=True)
class Copied:
    """A trial goes on from what ``source`` was at ``step``, as ``spec``: prompt, optimiser and result so far."""

    source: str
    step: int
    spec: TrialSpec


@dataclass(frozen=True)
class Costs:
    """What a trial takes, besides its accuracy."""

    parameters: int = 0
    """Numbers that are trained, those of a reparameterisation included."""
    stored_bytes: int = 0
    """What has to be kept for a task: the float32 tensors that inference needs, or the text."""
    peak_bytes: int = 0
    """The most that its worker held, frozen model and other seated trials included."""
    seconds: float = 0.0
    """Of training since the last report; a trial's share of steps that several took together."""
    evaluation_seconds: float = 0.0
    """Of this evaluation, the trial's share."""

    def metrics(self) -> dict[str, float]:
        """By the names that MLflow has them under."""
        return {f"cost_{name}": float(value) for name, value in vars(self).items()}

    def plus(self, later: Costs) -> Costs:
        """Both reports' costs: seconds of training add up."""
        peak = max(self.peak_bytes, later.peak_bytes)
        return replace(later, peak_bytes=peak, seconds=self.seconds + later.seconds)


@dataclass(frozen=True)
class Report:
    """One evaluation of one trial. ``ending`` says why the trial is over, None while it goes on.

    ``score`` is the best validation metric so far, by which trials are compared; the worst possible one before any.
    ``copied`` is what the trial took over since its last report, if it did. ``pending`` counts the reports of the same
    round that are handed on after this one.
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
    note: str = ""
    """How memory that ran out was dealt with; empty where there was enough."""
    copied: Copied | None = None
    own_score: float | None = None
    """The score as long as the trial has copied no other, which is what its configuration was worth; None once it has
    diverged. The broker keeps it."""
    worker: str = field(default="", compare=False)
    """The worker group that trained it. The broker adds it."""
    slot: int = field(default=0, compare=False)
    """Its place among the trials of the group, from 0. The broker adds it."""
    place: dict[str, str] = field(default_factory=dict, compare=False)
    """Where the group was then: ``node`` and ``device``. The broker adds it."""
    costs: Costs = field(default=Costs(), compare=False)
    pending: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Begun:
    """A trial under way, as a search goes on with it: what it is by now, its newest checkpoint if it has one, what it
    takes over before its next report, and its own score so far."""

    spec: TrialSpec
    checkpoint: bytes | None = None
    copied: Copied | None = None
    own_score: float | None = None
    has_copied: bool = False


@dataclass(frozen=True)
class EvaluationJob:
    """A split to evaluate: with the best prompt in ``checkpoint``, else with a written ``instruction``, else bare."""

    split: str
    checkpoint: bytes | None = None
    instruction: str | None = None
    spec: TrialSpec | None = None
    """The checkpoint's trial, by which baselines know what it holds."""
    confusion: bool = False
    """Also count which label was answered for which, as metrics ``confusion/TRUE/SAID`` by places in the verbalizer."""


CONFUSION = "confusion/"


def without_confusion(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(CONFUSION)}


def confusion_counts(metrics: Mapping[str, float], labels: int) -> list[list[int]]:
    """[true][said] counts, of metrics that were asked for with ``confusion``."""
    return [
        [int(metrics.get(f"{CONFUSION}{true}/{said}", 0)) for said in range(labels)]
        for true in range(labels)
    ]
