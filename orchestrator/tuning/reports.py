"""The engine's reports on trials, and the jobs that request an evaluation.

These are plain values without torch, so that they are cheap to unpickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.job.space import TrialSpec

Ending = Literal["steps", "patience", "evaluated", "diverged", "no_room"]
BROKEN: dict[Ending, str] = {"diverged": "diverged", "no_room": "out of memory"}
"""Endings of a trial that failed, as texts for users."""


@dataclass(frozen=True)
class Copied:
    """The state that a trial copied from another: prompt, optimiser and result so far."""

    source: str
    """The trial that was copied."""
    step: int
    """The step at which it was copied."""
    spec: TrialSpec
    """The configuration with which the copying trial continues."""


@dataclass(frozen=True)
class Costs:
    """The costs of a trial: parameters, storage, memory and time."""

    parameters: int = 0
    """Number of trained values, including those of a reparameterisation."""
    stored_bytes: int = 0
    """Bytes to store for a task: the float32 tensors that inference needs, or the text."""
    peak_bytes: int = 0
    """Peak memory of the trial's worker, including the frozen model and other seated trials."""
    seconds: float = 0.0
    """Training time since the last report.

    For steps that several trials took together, the trial's share."""
    evaluation_seconds: float = 0.0
    """The trial's share of the time of this evaluation."""

    def metrics(self) -> dict[str, float]:
        """Return the costs by their metric names in MLflow."""
        return {f"cost_{name}": float(value) for name, value in vars(self).items()}

    def plus(self, later: Costs) -> Costs:
        """Combine these costs with those of a later report.

        Training times add up, and the higher peak is taken. Everything else is as in the later one.
        """
        peak = max(self.peak_bytes, later.peak_bytes)
        return replace(later, peak_bytes=peak, seconds=self.seconds + later.seconds)


@dataclass(frozen=True)
class Report:
    """One evaluation of one trial."""

    trial: str
    step: int
    metrics: dict[str, float]
    train_loss: float
    best_step: int
    best_metrics: dict[str, float]
    score: float
    """The best validation metric so far, by which trials are compared.

    Before the first evaluation, the worst possible value."""
    checkpoint: bytes
    ending: Ending | None = None
    """Why the trial ended; None while it continues."""
    note: str = ""
    """A text on how the engine handled running out of memory; empty if memory sufficed."""
    copied: Copied | None = None
    """The state that the trial copied since its last report, if it did."""
    own_score: float | None = None
    """The last score before the trial copied another one: what its own configuration achieved.

    None if the trial diverged before it copied another. Set by the broker."""
    worker: str = field(default="", compare=False)
    """The worker group that trained the trial. Set by the broker."""
    slot: int = field(default=0, compare=False)
    """The trial's place among the trials of the group, from 0. Set by the broker."""
    place: dict[str, str] = field(default_factory=dict, compare=False)
    """The ``node`` and ``device`` of the group at the time. Set by the broker."""
    costs: Costs = field(default=Costs(), compare=False)
    pending: int = field(default=0, compare=False)
    """Number of reports of the same round that are delivered after this one."""


@dataclass(frozen=True)
class EvaluationJob:
    """A request to evaluate a split.

    The split is evaluated with the best prompt of ``checkpoint``. Without a checkpoint it is
    evaluated with a written ``instruction``, and without either with the bare input.
    """

    split: str
    checkpoint: bytes | None = None
    instruction: str | None = None
    spec: TrialSpec | None = None
    """The configuration of the checkpoint's trial, which baselines need to read the checkpoint."""
    confusion: bool = False
    """Report all metrics of labels, and count the answered labels for each true label, as metrics
    ``confusion/TRUE/SAID``.

    TRUE and SAID are indices in the verbalizer."""

    @property
    def subject(self) -> str:
        """Name the prompt or text and the split, for people."""
        if self.checkpoint is not None:
            prompt = "a trained prompt" if self.spec is None else self.spec.label()
        else:
            prompt = "no prompt" if self.instruction is None else "a written text"
        return f"{prompt} on {self.split}"


CONFUSION = "confusion/"


def without_confusion(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(CONFUSION)}


def confusion_counts(metrics: Mapping[str, float], labels: int) -> list[list[int]]:
    """Return counts as [true][said] from metrics evaluated with ``confusion``."""
    return [
        [int(metrics.get(f"{CONFUSION}{true}/{said}", 0)) for said in range(labels)]
        for true in range(labels)
    ]
