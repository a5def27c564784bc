"""The tuning engine: trains several trials at once in the slots of one frozen backbone.

All seated trials share packed training steps and packed evaluations. A trial is seated with
``seat``. It then runs rounds of steps, and each round ends with an evaluation and a ``Report``.
The trial leaves its slot when it ends, or when ``free`` removes it. Slots are taken and freed at
round boundaries only, so all seated trials are evaluated together, packed as they train.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.data.batches import step_rows
from orchestrator.data.class_weights import row_weights
from orchestrator.data.designs import Designs
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone, PromptTensors
from orchestrator.tuning.baselines import WeightChange
from orchestrator.tuning.checkpoint import Checkpoint, restore_prompt
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.memory import Memory
from orchestrator.tuning.meter import Meter, Span
from orchestrator.tuning.out_of_memory import NoRoom, Room, needs_room
from orchestrator.tuning.prompts import InitContext, Method, Prompt, make_prompt
from orchestrator.tuning.prompts.base import seeded
from orchestrator.tuning.reports import Costs, Ending, EvaluationJob, Report
from orchestrator.tuning.step import Limits, packed_gradients
from orchestrator.tuning.updater import Updater, apply_all
from orchestrator.tuning.worker_group import Group

NO_ROOM = "memory does not suffice"
FLOAT32_BYTES = 4  # artifacts store float32 numbers


@dataclass
class Task:
    """The task to learn: its data in tokens, and the method or methods of the job."""

    encoder: Encoder
    splits: dict[str, Encoded]
    """The tokenised rows of each split."""
    instructed: dict[str, dict[str, Encoded]] = field(default_factory=dict)
    """The tokenised splits again, for each written instruction, with the instruction in front."""
    method: Method = field(default_factory=Method)
    """The method of all trials, in a job of one method."""
    methods: dict[str, Method] = field(default_factory=dict)
    """The methods of a job that mixes several, by name; empty for a job of one method."""
    artifacts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Tensors of the registered prompts that trials may start from, by reference."""
    decoding: Decoding | None = None
    """Settings with which evaluations generate texts; None if the metric does not compare texts."""
    designs: Designs | None = None
    """The rows as method prompt_design writes them out; None for other methods."""

    def method_of(self, spec: TrialSpec) -> Method:
        """Return the method of a trial."""
        return self.methods[spec.method] if spec.method else self.method

    def of(self, method: str) -> Task:
        """Return the task of the trials of one of the methods, as a job of that method has it."""
        designs = self.designs if method == "prompt_design" else None
        return replace(self, method=self.methods[method], methods={}, designs=designs)


@dataclass
class Slot:
    """A trial's place in the engine, with its own prompt, optimiser and step count."""

    trial: str
    spec: TrialSpec
    prompt: Prompt | WeightChange
    updater: Updater
    base_model: str = ""
    step: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    """The best prompt's tensors as an artifact stores them; empty before the first evaluation."""
    waited: int = 0
    """Evaluations in a row without a better result."""
    losses: list[float] = field(default_factory=list)
    diverged: bool = False
    no_room: str = ""
    """Why the trial does not fit into memory, even in the smallest pieces; empty if it fits."""
    seconds: float = 0.0
    """The trial's share of the training time since its last report."""
    evaluation_seconds: float = 0.0
    """The trial's share of the time of the last evaluation."""

    @torch.no_grad()
    def tensors(self) -> PromptTensors:
        """Return the current prompt's tensors without gradients, for evaluation."""
        return self.prompt()  # type: ignore[no-any-return]

    @property
    def broken(self) -> bool:
        return self.diverged or bool(self.no_room)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.prompt.named_parameters())

    def state(self) -> Checkpoint:
        best = self.best or self.prompt.named()
        return Checkpoint.of(
            step=self.step,
            best_step=self.best_step,
            best_metrics=self.best_metrics,
            waited=self.waited,
            base_model=self.base_model,
            prompt=self.prompt.state_dict(),
            best=best,
            optimizer=self.updater.state_tensors(list(self.parameters)),
        )


class Engine:
    """An engine that trains up to ``capacity`` trials at once on one backbone.

    The workers of a ``group`` train together: each must make the same calls in the same order.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        train: TrainSpec,
        search: SearchSpec,
        capacity: int,
        limits: Limits = Limits(),
        group: Group = Group(),
        threads: Threads = Threads(),
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.train = train
        self.search = search
        self.capacity = capacity
        self.group = group
        self.threads = threads
        self.limits = (
            replace(limits, max_rows=train.micro_batch_size) if train.micro_batch_size else limits
        )
        self.meter = Meter()
        self.slots: dict[str, Slot] = {}
        self._training = Room(self.limits.max_tokens)
        self._evaluation = Room()
        self._memory = Memory(backbone.device)

    @property
    def free_slots(self) -> int:
        return self.capacity - len(self.slots)

    def seat(self, trial: str, spec: TrialSpec, checkpoint: bytes | None = None) -> None:
        """Give a trial a slot, starting afresh or from a checkpoint.

        Raises RuntimeError when all slots are taken.
        """
        if not self.free_slots:
            raise RuntimeError(f"no slot is free for trial {trial}: {self.capacity} are taken")
        if not self.slots:
            self._memory.start_over()
        prompt = self._learned(spec)
        updater = Updater(list(prompt.parameters()), spec.learning_rate, self.train)
        slot = Slot(trial, spec, prompt, updater, self.backbone.info.fingerprint)
        if checkpoint is not None:
            self._restore(slot, Checkpoint.from_bytes(checkpoint))
        self.slots[trial] = slot

    @cached_property
    def _context(self) -> InitContext:
        return InitContext.of(self.backbone, self.task.encoder.answer_words, self.task.artifacts)

    def _learned(self, spec: TrialSpec) -> Prompt | WeightChange:
        """Create the module that a trial trains, in its state before the first step."""
        return make_prompt(self.task.method, spec, self._context).to(self.backbone.device)

    @staticmethod
    def _restore(slot: Slot, state: Checkpoint) -> None:
        restore_prompt(slot.prompt, state, slot.base_model)
        slot.updater.load_state_tensors(list(slot.parameters), state.tensors)
        slot.step, slot.best_step, slot.waited = state.step, state.best_step, state.waited
        slot.best_metrics, slot.best = state.best_metrics, state.best()

    def free(self, trial: str) -> None:
        """Remove a trial from its slot.

        Unknown trials are ignored: a stop may arrive after the trial ended by itself.
        """
        self.slots.pop(trial, None)

    def measure_afresh(self) -> None:
        """Begin to measure the peak memory anew, of the work of this engine alone."""
        self._memory.start_over()

    def round(self) -> list[Report]:
        """Train every seated trial up to its next evaluation, evaluate them together, and report.

        A trial whose report has an ending leaves its slot.
        """
        if not self.slots:
            return []
        targets = {trial: self._next_evaluation(slot) for trial, slot in self.slots.items()}
        self._meter_round(targets)
        while running := [
            slot for trial, slot in self.slots.items() if self._runs(slot, targets[trial])
        ]:
            self.step(running)
            self.meter.add()
        reports = self.reports(list(self.slots.values()))
        for report in reports:
            if report.ending:
                self.free(report.trial)
        return reports

    def _meter_round(self, targets: Mapping[str, int]) -> None:
        """Tell the meter which steps each seated trial is about to take."""
        spans = {
            trial: Span(
                slot.step, targets[trial] if self._runs(slot, targets[trial]) else slot.step
            )
            for trial, slot in self.slots.items()
        }
        self.meter.start(spans)
        self.meter.begin("training", max(span.target - span.first for span in spans.values()))

    def evaluate(self, job: EvaluationJob) -> dict[str, float]:
        """Return the metrics of a prompt or a baseline on a whole split.

        Raises JobFailed when memory does not suffice for a single row.
        """
        self.meter.start({}, job.subject)
        if job.checkpoint is not None:
            metrics = self._checkpoint_metrics(job, Checkpoint.from_bytes(job.checkpoint))
        else:
            splits = (
                self.task.splits
                if job.instruction is None
                else self.task.instructed[job.instruction]
            )
            (metrics,) = self._metrics(None, splits[job.split])
        if metrics is None:
            raise JobFailed(
                f"the {job.split} split can't be evaluated: {NO_ROOM}, even one row at a time",
                "lower data.max_input_tokens, or use a larger machine or a smaller base model",
            )
        return metrics

    def _checkpoint_metrics(self, job: EvaluationJob, state: Checkpoint) -> dict[str, float] | None:
        best = PromptTensors.from_named(state.best(), self.task.method.inside)
        return self._metrics([best], self.task.splits[job.split], job.confusion)[0]

    def _slot_metrics(self, slots: Sequence[Slot]) -> list[dict[str, float] | None]:
        """Evaluate these slots together on the validation split."""
        return self._metrics([slot.tensors() for slot in slots], self.task.splits["validation"])

    def _metrics(
        self, prompts: Sequence[PromptTensors] | None, split: Encoded, confusion: bool = False
    ) -> list[dict[str, float] | None]:
        """Return the metrics of each prompt on a split.

        ``prompts=None`` gives one entry, for the model without a prompt. An entry is None when
        memory does not suffice for a single row of that prompt.
        """

        def of(places: Sequence[int]) -> list[dict[str, float]]:
            chosen = None if prompts is None else [prompts[place] for place in places]
            task, tokens = self.task, self._evaluation.tokens
            threads = self._side_by_side(self._evaluation)
            try:
                return evaluate(
                    self.backbone,
                    chosen,
                    split,
                    task.encoder,
                    task.decoding,
                    tokens,
                    self.group,
                    confusion,
                    threads,
                    self.search.metric,
                    self.meter,
                )
            except NoRoom:
                self.backbone.give_up_forward()
                raise

        return self._evaluation.each(1 if prompts is None else len(prompts), of)

    def _next_evaluation(self, slot: Slot) -> int:
        every = self.train.evaluate_every
        return min(self.train.steps, (slot.step // every + 1) * every)

    @staticmethod
    def _runs(slot: Slot, target: int) -> bool:
        return slot.step < target and not slot.broken

    def step(self, slots: Sequence[Slot]) -> None:
        """Run one packed training step of these seated trials."""
        started = time.perf_counter()
        split = self.task.splits["train"]
        rows = [
            step_rows(len(split), self.train.batch_size, slot.spec.seed, slot.step)
            for slot in slots
        ]
        found = self._training.each(
            len(slots),
            lambda places: self._gradients([slots[k] for k in places], [rows[k] for k in places]),
        )
        for slot, loss, batch in zip(slots, found, rows, strict=True):
            if loss is None:
                longest = max(split.lengths[row] for row in batch)
                slot.no_room = (
                    f"{NO_ROOM} for one row of {longest} tokens behind {_virtual_tokens(slot)}"
                )
        fitted = [(slot, loss) for slot, loss in zip(slots, found, strict=True) if loss is not None]
        for slot, loss in fitted:
            if not math.isfinite(loss):
                slot.prompt.zero_grad()  # without gradients, the trial is not updated
        norms = apply_all([slot.updater for slot, _ in fitted], [slot.step for slot, _ in fitted])
        for (slot, loss), norm in zip(fitted, norms, strict=True):
            slot.diverged = not (math.isfinite(loss) and math.isfinite(norm))
            if not slot.diverged:
                slot.losses.append(loss)
            slot.step += 1
        for slot in slots:
            slot.seconds += (time.perf_counter() - started) / len(slots)

    def _gradients(self, slots: Sequence[Slot], rows: Sequence[Sequence[int]]) -> list[float]:
        """Compute the slots' losses and leave the gradients on their parameters.

        Raises NoRoom when memory runs out; no gradients are left then.
        """
        parameters = [param for slot in slots for param in slot.prompt.parameters()]
        try:
            return self.group.summed(
                parameters, len(slots), lambda: self._own_gradients(slots, rows)
            )
        except NoRoom:
            for slot in slots:
                slot.prompt.zero_grad()  # forwards before the failed one left gradients
            self.backbone.give_up_forward()
            raise

    def _own_gradients(self, slots: Sequence[Slot], rows: Sequence[Sequence[int]]) -> list[float]:
        """Compute this worker's part of the slots' losses and gradients."""
        with self._dropout(slots[0]):
            with needs_room():
                prompts = [slot.prompt() for slot in slots]
            return self._packed(prompts, rows)

    def _packed(
        self,
        prompts: Sequence[PromptTensors] | None,
        rows: Sequence[Sequence[int]],
        learned: Sequence[Tensor] = (),
    ) -> list[float]:
        limits, threads = (
            replace(self.limits, max_tokens=self._training.tokens),
            self._side_by_side(self._training),
        )
        if self.train.frozen_dropout or (self.limits.max_rows or threads.ways) < threads.ways:
            # Run one forward at a time. Dropout must not depend on which thread draws first, and
            # threads side by side would run more than max_rows rows at once.
            threads = threads.together()
        split, reduction = self.task.splits["train"], self.train.loss_reduction
        return packed_gradients(
            self.backbone, prompts, rows, split, limits, reduction, self.group, threads, learned,
            self._row_weights,
        )  # fmt: skip

    @cached_property
    def _row_weights(self) -> list[float] | None:
        """The weight of each training row; None if all count the same."""
        weights, verbalizer = self.train.class_weights, self.task.encoder.verbalizer
        if weights is None or verbalizer is None:
            return None
        return row_weights(weights, self.task.splits["train"].labels, verbalizer)

    def _side_by_side(self, room: Room) -> Threads:
        """Return the threads to use: one forward at a time if memory has been short."""
        return self.threads.together() if room.note else self.threads

    @contextmanager
    def _dropout(self, first: Slot) -> Iterator[None]:
        """Turn on the frozen model's own dropout if ``train.frozen_dropout`` is set.

        The random state is set from the seed, the step and the worker's rank, so that a resumed
        trial continues as it would have without the interruption.
        """
        if not self.train.frozen_dropout:
            yield
            return
        place = (first.spec.seed, first.step) + ((self.group.rank,) if self.group.rank else ())
        with seeded(hash(place) % 2**32):
            self.backbone.model.train()
            try:
                yield
            finally:
                self.backbone.model.eval()

    def reports(self, slots: Sequence[Slot]) -> list[Report]:
        """Evaluate these seated trials together and return a report for each."""
        for slot in slots:  # the last update may have overflowed, and no later loss shows it
            slot.diverged = slot.diverged or not all(
                bool(part.isfinite().all()) for part in slot.prompt.parameters()
            )
        sound = [slot for slot in slots if not slot.broken]
        started = time.perf_counter()
        found = self._slot_metrics(sound) if sound else []
        metrics: dict[str, dict[str, float]] = {}
        for slot, one in zip(sound, found, strict=True):
            slot.evaluation_seconds = (time.perf_counter() - started) / len(sound)
            if one is None:
                slot.no_room = f"{NO_ROOM} to evaluate one row behind {_virtual_tokens(slot)}"
            elif not all(map(math.isfinite, one.values())):
                slot.diverged = True
            else:
                metrics[slot.trial] = one
        return [self._report(slot, metrics.get(slot.trial, {})) for slot in slots]

    def _report(self, slot: Slot, metrics: dict[str, float]) -> Report:
        if metrics and self._is_better(metrics, slot.best_metrics):
            slot.best_step, slot.best_metrics, slot.waited = slot.step, metrics, 0
            slot.best = {name: tensor.clone() for name, tensor in slot.prompt.named().items()}
        else:
            slot.waited += 1
        train_loss = float(np.mean(slot.losses)) if slot.losses else math.nan
        costs = self._costs(slot)
        slot.losses, slot.seconds = [], 0.0
        return Report(
            trial=slot.trial,
            step=slot.step,
            metrics=metrics,
            train_loss=train_loss,
            best_step=slot.best_step,
            best_metrics=slot.best_metrics,
            score=slot.best_metrics.get(self.search.metric, self.search.ranked_by.worst),
            checkpoint=slot.state().to_bytes() if self.group.leads else b"",
            ending=self._ending(slot),
            note=slot.no_room or self._room_notes(),
            costs=costs,
        )

    def _costs(self, slot: Slot) -> Costs:
        return Costs(
            parameters=sum(parameter.numel() for parameter in slot.prompt.parameters()),
            stored_bytes=self._stored_bytes(slot),
            peak_bytes=self._memory.peak(),
            seconds=slot.seconds,
            evaluation_seconds=slot.evaluation_seconds,
        )

    def _stored_bytes(self, slot: Slot) -> int:
        return sum(
            FLOAT32_BYTES * tensor.numel() for tensor in (slot.best or slot.prompt.named()).values()
        )

    def _room_notes(self) -> str:
        rooms = {"training": self._training, "evaluation": self._evaluation}
        return "; ".join(f"{name} {room.note}" for name, room in rooms.items() if room.note)

    def _is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """Compare by the search's metric; ties are decided by the loss."""
        if not best:
            return True
        name, sign = self.search.metric, self.search.ranked_by.sign
        return (sign * metrics[name], -metrics["loss"]) > (sign * best[name], -best["loss"])

    def _ending(self, slot: Slot) -> Ending | None:
        if slot.no_room:
            return "no_room"
        if slot.diverged:
            return "diverged"
        if slot.step >= self.train.steps:
            return "steps"
        if self.train.patience is not None and slot.waited >= self.train.patience:
            return "patience"
        return None


def _virtual_tokens(slot: Slot) -> str:
    count = slot.spec.num_virtual_tokens
    if not count:
        return "no prompt"
    return f"{count} virtual token{'' if count == 1 else 's'}"
