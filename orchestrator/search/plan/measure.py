"""Measurements of a worker's time and memory on real steps and evaluations of a job.

They run in a child process, which ends with them. Memory is measured on the largest trials and rows
that the search space and the data allow, time on typical ones. For a group of workers, one worker's
share of the rows is measured without the other workers. The memory that sharding would place on
other workers is subtracted.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from orchestrator.data.encoding import Encoded
from orchestrator.errors import TRACEBACK, JobFailed, OrchestratorError
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, StopSpec
from orchestrator.models.backbone import (
    Backbone,
    bytes_elsewhere,
    device_for,
    load_backbone,
    set_threads,
)
from orchestrator.models.source import resolve_model
from orchestrator.search.plan.forecast import Pace
from orchestrator.search.prepare import Prepared, likely_trials
from orchestrator.search.workers.placement import Placement
from orchestrator.tuning import evaluate as evaluation
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.memory import Memory
from orchestrator.tuning.reports import EvaluationJob
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

STEPS = 12  # most steps of a measurement
BUDGET_S = 2.0  # a measurement ends with the step that exceeds these seconds
ROWS = 64  # rows of a measured evaluation, spread evenly over the row lengths
# Steps of a rehearsal's trial: the second round shows a report's way without one-time work.
SHORT_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """The measured time and memory of a worker.

    Memory is in bytes: ``weights`` alone, ``idle`` with the base model loaded, ``usual`` with
    typical trials and rows of the search, ``peak`` with the largest.
    """

    device: str
    pace: Pace
    bare_row_s: float
    """Seconds to evaluate a row without a prompt."""
    load_s: float
    """Seconds from the start of the process to the loaded base model."""
    weights: int
    idle: int
    usual: int
    peak: int
    room: int
    """Total memory of the device, or of the machine for a CPU."""
    short: int = 0
    """Memory with the trials of a rehearsal.

    The difference to the memory of a rehearsal's worker is what a worker holds besides.
    """
    cuts: tuple[str, ...] = ()
    """Notes on how memory that ran out in the largest step or evaluation was dealt with."""


def measure(prepared: Prepared, placement: Placement) -> Measured:
    """Measure the job in a child process.

    Raises JobFailed when the system ended that process, usually for lack of memory.
    """
    started = time.time()
    return in_child(_measure, prepared, placement, started)


def in_child(
    work: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Value:
    """Call ``work`` in a fresh process, and raise its errors here.

    Raises JobFailed when the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_call, args=(sender, partial(work, *args, **kwargs)), daemon=True
    )
    process.start()
    sender.close()
    try:
        done, result = receiver.recv()
    except EOFError:
        process.join()
        raise JobFailed(
            f"the process that measured the job was ended (exit code {process.exitcode}), "
            "most likely because its largest step does not fit into memory",
            "lower train.batch_size, resources.trials_per_worker or data.max_input_tokens, or set "
            "train.micro_batch_size",
        ) from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if not done:
        raise result
    value: Value = result
    return value


def _call(sender: Connection, work: Callable[[], object]) -> None:
    """Send the parent the result of ``work``, or its error."""
    # The parent receives the signal too, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sender.send((True, work()))
    except OrchestratorError as error:
        sender.send((False, error))
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        sender.send(
            (
                False,
                JobFailed(
                    f"the job can't be measured: {first_line(error, with_type=True)}",
                    f"{TRACEBACK}=1 shows where it arose",
                ),
            )
        )


def _measure(prepared: Prepared, placement: Placement, started: float) -> Measured:
    """Load the base model and measure the job on it, in the child process."""
    set_threads(placement.threads)
    device = device_for(placement.gpus)
    model = prepared.job.base_model
    backbone = load_backbone(resolve_model(model), device, model.dtype)
    load_s = time.time() - started
    memory = Memory(device)
    idle = memory.start_over()
    # Measure from small to large, since a measurement may not give back all of its memory.
    parts = [(part, _share(part, prepared.total, placement)) for part in prepared.parts]
    shortest = [Bench(shortened(part, seats), seats, backbone).held() for part, seats in parts]
    short = max(idle, *shortest)
    benches = [Bench(part, seats, backbone) for part, seats in parts]
    pace = _mean([bench.pace() for bench in benches], [part.total for part, _ in parts], placement)
    bare_row_s = benches[0].bare_row()
    usual = max(*(bench.most for bench in benches), memory.peak(), short)
    cuts = tuple(dict.fromkeys(cut for bench in benches for cut in bench.largest()))
    peak = max(memory.peak(), usual)
    weights = weight_bytes(backbone.model)
    sharded = prepared.job.resources.sharding != "none"
    elsewhere = bytes_elsewhere(backbone.model, placement.workers_per_group) if sharded else 0
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        pace=pace,
        bare_row_s=bare_row_s,
        load_s=load_s,
        weights=weights - elsewhere,
        idle=max(0, idle - elsewhere),
        usual=max(0, usual - elsewhere),
        peak=max(0, peak - elsewhere),
        room=memory.room(),
        short=max(0, short - elsewhere),
        cuts=cuts,
    )


def _share(part: Prepared, total: int, placement: Placement) -> Placement:
    """Give the trials of a method the seats of a worker that they take on average."""
    seats = max(1, round(placement.trials_per_worker * part.total / total))
    return replace(placement, trials_per_worker=1 if part.job.is_baseline else seats)


def _mean(paces: Sequence[Pace], trials: Sequence[int], placement: Placement) -> Pace:
    """Return the mean pace of methods with so many trials, each of which trains on its own."""
    if len(paces) == 1:
        return paces[0]
    slots, total = placement.trials_per_worker, sum(trials)
    parts = [count / total for count in trials]
    seats = [max(1, round(slots * part)) for part in parts]

    def mean(values: Sequence[float]) -> float:
        return sum(part * value for part, value in zip(parts, values, strict=True))

    # A worker's methods take turns, so a step of a full worker is a step of each.
    step = sum(pace.step(count) for pace, count in zip(paces, seats, strict=True))
    evaluation = sum(pace.evaluation(count) for pace, count in zip(paces, seats, strict=True))
    return Pace(
        mean([pace.step_alone for pace in paces]),
        step if slots > 1 else mean([pace.step_alone for pace in paces]),
        mean([pace.evaluation_alone for pace in paces]),
        evaluation if slots > 1 else mean([pace.evaluation_alone for pace in paces]),
        slots,
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and saved buffers.

    A tied parameter has several names, such as those of the embeddings and of the head, and is
    counted once.
    """
    tensors = model.state_dict(keep_vars=True).values()
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


class Bench:
    """A test bench that runs engines for parts of a job on one backbone."""

    def __init__(self, prepared: Prepared, placement: Placement, backbone: Backbone) -> None:
        self._prepared = prepared
        self._slots = placement.trials_per_worker
        self._cores = placement.threads
        self._together = placement.workers_per_group
        train = prepared.job.train
        self._train = train.model_copy(
            update={"batch_size": -(-train.batch_size // self._together)}
        )
        self._backbone = backbone
        self._task = prepared.task
        self._trials = likely_trials(prepared)
        whole = prepared.task.splits["validation"]
        sample = spread(range(len(whole)), ROWS, key=lambda row: whole.lengths[row])
        # Written prompts are evaluated on all rows of the task, so there is nothing to scale.
        self._scale = (1.0 if self._task.designs else len(whole) / len(sample)) / self._together
        self._sampled = self._with(validation=cut(whole, sample))
        self._memory = Memory(backbone.device)
        self.most = 0
        """Most memory of the engines so far, in bytes; each engine resets the device's peak."""

    def held(self) -> int:
        """Return the peak memory in bytes of training and evaluating trials in all slots."""
        self._seconds(self._trials[: self._slots])
        return self.most

    def largest(self) -> tuple[str, ...]:
        """Run a step and an evaluation with full slots, the longest prompts and the longest rows.

        Returns the notes on how memory that ran out was dealt with.
        """
        train, validation = (self._task.splits[name] for name in ("train", "validation"))
        rows = by_length(train)[: self._prepared.job.train.batch_size : self._together]
        fits = max(
            1, evaluation.forward_tokens(self._backbone) // (max(validation.lengths) * self._slots)
        )
        task = self._with(
            train=cut(train, rows), validation=cut(validation, by_length(validation)[:fits])
        )
        trial = max(self._trials, key=lambda trial: trial.size)
        engine = self._engine(task, [trial] * self._slots)
        seated = list(engine.slots.values())
        engine.step(seated)
        return tuple(dict.fromkeys(report.note for report in engine.reports(seated) if report.note))

    def pace(self) -> Pace:
        """Measure a step and a whole evaluation, with one trial and with full slots."""
        typical = spread(self._trials, self._slots, key=lambda trial: trial.size)
        filled = (typical * self._slots)[: self._slots]
        packed = self._seconds(filled)
        alone = packed if self._slots == 1 else self._seconds([filled[len(filled) // 2]])
        return Pace(alone[0], packed[0], alone[1], packed[1], self._slots)

    def _seconds(self, trials: Sequence[TrialSpec]) -> tuple[float, float]:
        """Measure the seconds of a step and of a whole evaluation of the trials together."""
        engine = self._engine(self._sampled, trials)
        seated = list(engine.slots.values())
        engine.step(seated)  # not timed, since the first step does one-time work
        most = max(1, min(STEPS, self._prepared.job.train.steps - 1))
        step_s = timed(lambda: engine.step(seated), most)
        evaluation_s = timed(lambda: engine.reports(seated), 1)
        self.most = max(self.most, self._memory.peak())
        return step_s, self._scale * evaluation_s

    def bare_row(self) -> float:
        """Measure the seconds to evaluate a row without a prompt."""
        engine = self._engine(self._sampled, [])
        seconds = timed(lambda: engine.evaluate(EvaluationJob("validation")), 1)
        return seconds / len(self._sampled.splits["validation"]) / self._together

    def _engine(self, task: Task, trials: Sequence[TrialSpec]) -> Engine:
        job = self._prepared.job
        search = of_few_rows(job.search)
        engine = make_engine(
            self._backbone, task, self._train, search, max(1, len(trials)), cores=self._cores
        )
        for place, trial in enumerate(trials):
            engine.seat(f"t{place}", trial)
        return engine

    def _with(self, **splits: Encoded) -> Task:
        return replace(self._task, splits={**self._task.splits, **splits})


def shortened(prepared: Prepared, placement: Placement) -> Prepared:
    """Cut the job down to a trial for every slot, with two steps of one row each.

    One row is evaluated after each step.
    """
    job = prepared.job
    trials = likely_trials(prepared)[: placement.slots]
    plain = {"searcher": "random", "scheduler": "fifo", "stop": StopSpec(), "trials": len(trials)}
    short = {
        "steps": SHORT_STEPS,
        "evaluate_every": 1,
        "batch_size": 1,
        "micro_batch_size": None,
        "warmup_steps": 0,
    }
    task = replace(
        prepared.task,
        splits={name: cut(split, [0]) for name, split in prepared.task.splits.items()},
    )
    changes = {
        "search": of_few_rows(job.search).model_copy(update={**plain, "perturbation_steps": None}),
        "train": job.train.model_copy(update={**short, "patience": None}),
    }
    return replace(
        prepared, job=job.model_copy(update=changes), trials=trials, total=len(trials), task=task
    )


def of_few_rows(search: SearchSpec) -> SearchSpec:
    """Rank by the loss if the search's metric may have no value on a few rows."""
    if not search.ranked_by.needs_scores:
        return search
    return search.model_copy(update={"metric": "loss", "mode": None})


def timed(work: Callable[[], object], most: int) -> float:
    """Return the mean seconds of ``work`` over at most ``most`` calls within ``BUDGET_S``."""
    started, done = time.perf_counter(), 0
    while done < most and time.perf_counter() - started < BUDGET_S:
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        done += 1
    return (time.perf_counter() - started) / done


def by_length(split: Encoded) -> list[int]:
    """Return the row numbers, longest rows first."""
    return sorted(range(len(split)), key=lambda row: -split.lengths[row])


def cut(split: Encoded, rows: Sequence[int]) -> Encoded:
    """Return the rows of a split that have these numbers."""
    return Encoded(
        [split.inputs[row] for row in rows],
        [split.targets[row] for row in rows],
        [split.labels[row] for row in rows],
        [split.references[row] for row in rows] if split.references else [],
    )


def spread(
    values: Sequence[Value], count: int, key: Callable[[Value], SupportsRichComparison]
) -> list[Value]:
    """Pick at most ``count`` of the values, evenly spaced in their order by ``key``."""
    ordered = sorted(values, key=key)
    taken = min(count, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * taken)] for place in range(taken)]
