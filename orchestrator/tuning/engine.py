"""The tuning engine: trials in slots of one frozen backbone, a packed step for all of them, an evaluation at a time.

A trial's life: ``seat`` -> rounds of steps, each ended by an evaluation and a ``Report`` -> finished, or ``free``.
Slots start and end at round boundaries, so all seated trials evaluate together, packed as they train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.backbone import Backbone
from orchestrator.data.bucketing import step_rows
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.prompts.inits import InitContext, initial_prompt
from orchestrator.space import TrialSpec
from orchestrator.spec import SearchSpec, TrainSpec
from orchestrator.tuning.checkpoint import TrialState, optimizer_tensors, restore_optimizer
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.optimizers import make_optimizer
from orchestrator.tuning.report import Ending, EvaluationJob, Report
from orchestrator.tuning.step import Limits, packed_gradients

WORST = {"max": 0.0, "min": 1e30}  # accuracies are never below 0; schedulers can't compare an infinity


@dataclass
class Task:
    """What is learned: the encoder, the tokenised splits, and those again behind each written instruction."""

    encoder: Encoder
    splits: dict[str, Encoded]
    instructed: dict[str, dict[str, Encoded]] = field(default_factory=dict)
    decoding: Decoding | None = None
    """How evaluations generate texts, where the metric compares them."""


@dataclass
class Slot:
    """A trial's place: its own prompt, optimiser and step count."""

    trial: str
    spec: TrialSpec
    prompt: nn.Parameter
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_prompt: Tensor | None = None
    waited: int = 0
    losses: list[float] = field(default_factory=list)
    diverged: bool = False

    def state(self) -> TrialState:
        best = self.prompt if self.best_prompt is None else self.best_prompt
        tensors = {"prompt": self.prompt.data, "best": best.data, **optimizer_tensors(self.optimizer, self.prompt)}
        return TrialState(self.step, self.best_step, self.best_metrics, self.waited, tensors)


class Engine:
    """Trains up to ``capacity`` trials at once on one backbone."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        train: TrainSpec,
        search: SearchSpec,
        capacity: int,
        limits: Limits = Limits(),
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.train = train
        self.search = search
        self.capacity = capacity
        self.limits = limits
        self.slots: dict[str, Slot] = {}
        self._context = InitContext.of(backbone, task.encoder.answers)

    @property
    def free_slots(self) -> int:
        return self.capacity - len(self.slots)

    def seat(self, trial: str, spec: TrialSpec, checkpoint: bytes | None = None) -> None:
        """Give a trial a slot, from the start or from a checkpoint."""
        if not self.free_slots:
            raise RuntimeError(f"no slot is free for trial {trial}: {self.capacity} are taken")
        if checkpoint is None:
            prompt = nn.Parameter(initial_prompt(spec, self._context).to(self.backbone.device))
            slot = Slot(trial, spec, prompt, make_optimizer(prompt, spec.learning_rate, self.train))
        else:
            slot = self._restored(trial, spec, TrialState.from_bytes(checkpoint))
        self.slots[trial] = slot

    def _restored(self, trial: str, spec: TrialSpec, state: TrialState) -> Slot:
        prompt = nn.Parameter(state.tensors["prompt"].to(self.backbone.device))
        optimizer = make_optimizer(prompt, spec.learning_rate, self.train)
        restore_optimizer(optimizer, prompt, state.tensors)
        best = state.tensors["best"].to(self.backbone.device)
        return Slot(trial, spec, prompt, optimizer, state.step, state.best_step, state.best_metrics, best, state.waited)

    def free(self, trial: str) -> None:
        """Take a trial's slot away; unknown trials are ignored, since stops may cross."""
        self.slots.pop(trial, None)

    def round(self) -> list[Report]:
        """Train every seated trial up to its next evaluation, evaluate them together, and report.

        A trial that is over leaves its slot.
        """
        if not self.slots:
            return []
        targets = {trial: self._next_evaluation(slot) for trial, slot in self.slots.items()}
        while running := [slot for trial, slot in self.slots.items() if self._runs(slot, targets[trial])]:
            self._step(running)
        reports = self._evaluate(list(self.slots.values()))
        for report in reports:
            if report.ending:
                self.free(report.trial)
        return reports

    def evaluate(self, job: EvaluationJob) -> dict[str, float]:
        """Metrics of a prompt or a baseline on a whole split."""
        if job.checkpoint is not None:
            best = TrialState.from_bytes(job.checkpoint).tensors["best"].to(self.backbone.device)
            return self._metrics([best], self.task.splits[job.split])[0]
        splits = self.task.splits if job.instruction is None else self.task.instructed[job.instruction]
        return self._metrics(None, splits[job.split])[0]

    def _metrics(self, prompts: Sequence[Tensor] | None, split: Encoded) -> list[dict[str, float]]:
        return evaluate(self.backbone, prompts, split, self.task.encoder, self.task.decoding)

    def _next_evaluation(self, slot: Slot) -> int:
        every = self.train.evaluate_every
        return min(self.train.steps, (slot.step // every + 1) * every)

    @staticmethod
    def _runs(slot: Slot, target: int) -> bool:
        return slot.step < target and not slot.diverged

    def _step(self, slots: Sequence[Slot]) -> None:
        split = self.task.splits["train"]
        rows = [step_rows(len(split), self.train.batch_size, slot.spec.seed, slot.step) for slot in slots]
        losses = packed_gradients(self.backbone, [slot.prompt for slot in slots], rows, split, self.limits)
        for slot, loss in zip(slots, losses, strict=True):
            slot.diverged = not math.isfinite(loss) or not bool(torch.isfinite(slot.prompt.grad).all())  # type: ignore[arg-type]
            if not slot.diverged:
                slot.optimizer.step()
                slot.losses.append(loss)
            slot.optimizer.zero_grad(set_to_none=True)
            slot.step += 1

    def _evaluate(self, slots: Sequence[Slot]) -> list[Report]:
        for slot in slots:  # a last step may overflow without a loss to show it
            slot.diverged = slot.diverged or not bool(torch.isfinite(slot.prompt).all())
        sound = [slot for slot in slots if not slot.diverged]
        prompts, validation = [slot.prompt for slot in sound], self.task.splits["validation"]
        found = self._metrics(prompts, validation) if sound else []
        metrics = {slot.trial: one for slot, one in zip(sound, found, strict=True)}
        for slot in sound:
            slot.diverged = not all(map(math.isfinite, metrics[slot.trial].values()))
        return [self._report(slot, {} if slot.diverged else metrics[slot.trial]) for slot in slots]

    def _report(self, slot: Slot, metrics: dict[str, float]) -> Report:
        if metrics and self._is_better(metrics, slot.best_metrics):
            slot.best_step, slot.best_metrics, slot.waited = slot.step, metrics, 0
            slot.best_prompt = slot.prompt.detach().clone()
        else:
            slot.waited += 1
        train_loss = float(np.mean(slot.losses)) if slot.losses else math.nan
        slot.losses = []
        return Report(
            trial=slot.trial,
            step=slot.step,
            metrics=metrics,
            train_loss=train_loss,
            best_step=slot.best_step,
            best_metrics=slot.best_metrics,
            score=slot.best_metrics.get(self.search.metric, WORST[self.search.better]),
            checkpoint=slot.state().to_bytes(),
            ending=self._ending(slot),
        )

    def _is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """Better by the search's metric; equal metrics are decided by the loss."""
        if not best:
            return True
        sign = 1.0 if self.search.better == "max" else -1.0
        name = self.search.metric
        return (sign * metrics[name], -metrics["loss"]) > (sign * best[name], -best["loss"])

    def _ending(self, slot: Slot) -> Ending | None:
        if slot.diverged:
            return "diverged"
        if slot.step >= self.train.steps:
            return "steps"
        if self.train.patience is not None and slot.waited >= self.train.patience:
            return "patience"
        return None
