"""Processes that train as one group, on gloo and the loopback device, without Ray."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from models import MASKED, SEQ2SEQ, text_rows, tiny_model, tiny_tokenizer, tokenizer_of

from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone, make_backbone
from orchestrator.models.backbone.sharding import blocks_of, is_part, local
from orchestrator.models.source import BaseModelInfo
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.reports import EvaluationJob, Report
from orchestrator.tuning.worker_group import joined_group

LIMIT_S = 240.0  # for a group that hangs
TRIALS = {
    "text": TrialSpec("text", "is this message spam", 5, 0.05, 0),
    "random": TrialSpec("random", None, 2, 0.02, 1),
    "labels": TrialSpec("class_labels", None, 7, 0.03, 2),
}
CPU = torch.device("cpu")
PLAIN = Method()
# SGD's updates are proportional to the gradients. AdamW's first updates are the signs of the
# gradients, and the sign of a rounded zero is arbitrary.
SGD = TrainSpec(steps=4, batch_size=5, evaluate_every=2, optimizer="sgd", momentum=0.5)


class Processes:
    """A process group of ``size`` processes; calling it runs a function in each of them."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["group_processes"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the function's results by rank.

        Raises AssertionError if a process raises an error or does not answer within LIMIT_S.
        """
        for pipe in self._pipes:
            pipe.send((work, arguments))
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(LIMIT_S), f"worker {rank} hangs"
        answers = [pipe.recv() for pipe in self._pipes]
        for done, value in answers:
            assert done, value
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(
        "127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=LIMIT_S)
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_S)
    )
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send((True, work(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


@dataclass(frozen=True)
class Case:
    """The training job of a group: TRIALS with one method on a tiny model."""

    family: str = "llama"
    method: Method = PLAIN
    train: TrainSpec = SGD
    sharded: bool = False
    generates: bool = False
    num_beams: int = 1

    def task(self) -> Task:
        tokenizer = tokenizer_of(self.family)
        family = (
            "seq2seq" if self.family in SEQ2SEQ else "masked" if self.family in MASKED else "causal"
        )
        template = Template(
            "{*}a {text} {*}{_} spam?{*}" if self.method.inside else "{text}\nspam?"
        )
        verbalizer = None if self.generates else Verbalizer((0, 1), (" quick", " yes no"))
        encoder = Encoder(tokenizer, template, verbalizer, 40, 32, family)
        sizes = {"train": 12, "validation": 7, "test": 2}
        rows = {
            name: text_rows(count, seed)
            for seed, (name, count) in enumerate(sizes.items(), start=1)
        }
        splits = {
            name: encoder.encode(of, "answer" if self.generates else "label")
            for name, of in rows.items()
        }
        if self.generates:
            splits = {
                name: replace(split, references=[[row["answer"]] for row in rows[name]])
                for name, split in splits.items()
            }
        decoding = Decoding(6, self.num_beams) if self.generates else None
        return Task(encoder, splits, method=self.method, decoding=decoding)

    def backbone(self) -> Backbone:
        """Return a new model for each call, because sharding changes it."""
        model = tiny_model.__wrapped__(self.family)
        info = BaseModelInfo("tiny", "main", self.family, 32, len(tiny_tokenizer()), 160, "0", "0")
        return make_backbone(model, tokenizer_of(self.family), info)

    def engine(self) -> Engine:
        backbone = self.backbone()
        group = joined_group(CPU, self.sharded)
        if self.sharded and group.size > 1:
            backbone.shard(CPU, group.agree)
            backbone.gather_once()
        return Engine(
            backbone, self.task(), self.train, SearchSpec(metric="loss"), len(TRIALS), group=group
        )


@dataclass(frozen=True)
class Ended:
    """Reports of each trial, metrics without a prompt, and whether the weights stayed the same."""

    reports: dict[str, list[Report]]
    bare: dict[str, float]
    frozen: bool


def ended(case: Case, change: Callable[[Engine], None] | None = None) -> Ended:
    """Train the case's trials to their end; apply ``change`` to the engine first."""
    engine = case.engine()
    digest = engine.backbone.digest()
    if change is not None:
        change(engine)
    for name, spec in TRIALS.items():
        engine.seat(name, spec)
    bare = engine.evaluate(EvaluationJob("test"))
    reports: dict[str, list[Report]] = {name: [] for name in TRIALS}
    while engine.slots:
        for report in engine.round():
            reports[report.trial].append(report)
    return Ended(reports, bare, engine.backbone.digest() == digest)


def cramped(engine: Engine, tokens: int, backward: bool) -> None:
    """Make the last worker run out of memory in forwards of more than ``tokens`` tokens.

    The error comes from within the last block's forward; with ``backward``, training gets it in the
    backward pass instead.
    """
    if engine.group.rank != engine.group.size - 1:
        return
    last = blocks_of(engine.backbone.model)[-1]

    def run_out(*_: Any) -> None:
        raise MemoryError

    def forward(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[0] * hidden.shape[1] > tokens:
            if not (backward and hidden.requires_grad):
                run_out()
            hidden.register_hook(run_out)

    last.register_forward_hook(forward)


def short_of_room(engine: Engine) -> None:
    cramped(engine, 60, backward=True)


def roomless(engine: Engine) -> None:
    cramped(engine, 1, backward=False)


def notes_of(case: Case, change: Callable[[Engine], None]) -> dict[str, tuple[Any, str]]:
    """Return how each trial ends and the note in its report."""
    engine = case.engine()
    for name, spec in TRIALS.items():
        engine.seat(name, spec)
    change(engine)
    return {report.trial: (report.ending, report.note) for report in engine.round()}


@dataclass(frozen=True)
class Held:
    """Size in bytes of a worker's weights; whether all workers' parts form the loaded model."""

    nbytes: int
    same: bool


def held(case: Case) -> Held:
    engine, whole = case.engine(), case.backbone().model.state_dict()
    mine = engine.backbone.model.state_dict()
    unshared = {id(tensor): local(tensor) for tensor in engine.backbone.model.parameters()}
    full = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in mine.items()
    }
    same = full.keys() == whole.keys() and all(
        torch.equal(full[name], whole[name]) for name in whole
    )
    return Held(sum(tensor.nbytes for tensor in unshared.values()), same)


def left_alone(case: Case) -> str:
    engine = case.engine()

    def work() -> str:
        if engine.group.leads:
            raise RuntimeError("shapes do not match")
        return "left alone"

    try:
        return work() if engine.group.rank else engine.group.together(work)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def most_whole(case: Case) -> int:
    """Return how many blocks are whole, at most, just before another block is gathered.

    The count covers one training step and one evaluation.
    """
    backbone, counts = case.backbone(), [0]
    group = joined_group(CPU, in_step=True)

    def count() -> None:
        group.agree()
        counts.append(
            sum(not is_part(next(block.parameters())) for block in blocks_of(backbone.model))
        )

    backbone.shard(CPU, count)
    backbone.gather_once()
    engine = Engine(
        backbone, case.task(), case.train, SearchSpec(metric="loss"), len(TRIALS), group=group
    )
    for name, spec in TRIALS.items():
        engine.seat(name, spec)
    engine.round()
    return max(counts)
