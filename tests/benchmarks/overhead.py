"""Share of an engine's step that is not the model: optimiser, data and bookkeeping.

The model's time is that of its forwards, the loss and autograd. The rest of a step is overhead:
choosing, grouping and padding rows, making tensors, the optimiser, and checking whether a trial
diverged. Reports and checkpoints happen once an evaluation; their time is spread over the default
number of steps between two evaluations.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import CausalBackbone, Rows, default_device
from orchestrator.tuning import engine as engine_module
from orchestrator.tuning import step as step_module
from orchestrator.tuning.engine import Engine, Task
from tests.benchmarks.measure import Line, seconds
from tests.benchmarks.subjects import SIZES, make_backbone, make_encoder, make_rows

BETWEEN = TrainSpec().evaluate_every


@dataclass(frozen=True)
class Setting:
    """Models, number of trials, and number of steps to time."""

    sizes: tuple[str, ...] = ("6x192", "6x512")
    trials: int = 4
    batch: int = 16
    shortest: int = 20
    longest: int = 40
    prompt: int = 20
    steps: dict[str, int] = field(default_factory=lambda: {"toy": 3, "6x192": 20, "6x512": 4})
    device: torch.device = field(default_factory=default_device)


@dataclass
class Stopwatch:
    """Seconds of named parts.

    A part nested in itself counts once. The model's time within an evaluation does not count as
    time of a step.
    """

    spent: dict[str, float] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            if part in self.running or "evaluation" in self.running:
                return call(*args, **options)
            self.running.add(part)
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start
                self.running.discard(part)

        return timed


def lines(setting: Setting) -> list[Line]:
    return [_line(setting, name) for name in setting.sizes]


def _line(setting: Setting, name: str) -> Line:
    backbone = make_backbone(SIZES[name], setting.device)
    engine = _engine(setting, backbone, setting.steps[name])
    engine.round()  # warm-up, not measured
    watch = Stopwatch()
    with _watched(watch, backbone, engine):
        whole = seconds(engine.round)
    spent = {
        part: watch.spent.get(part, 0.0)
        for part in ("steps", "model", "optimiser", "data", "evaluation")
    }
    rest = spent["steps"] - spent["model"] - spent["optimiser"] - spent["data"]
    reports = (whole - spent["steps"] - spent["evaluation"]) * setting.steps[name] / BETWEEN
    shares = {
        part: 100 * taken / spent["steps"]
        for part, taken in {**spent, "bookkeeping": rest, "reports": reports}.items()
        if part not in ("steps", "model", "evaluation")
    }
    shown = {f"{part}, %": share for part, share in shares.items()}
    step_ms = 1000 * spent["steps"] / setting.steps[name]
    together = {"step, ms": step_ms, "together, %": sum(shares.values())}
    title = f"{name}, {setting.trials} trials of {setting.batch} rows"
    return Line(title, {**shown, **together}, {"seconds": spent, "round": whole})


def _engine(setting: Setting, backbone: CausalBackbone, steps: int) -> Engine:
    encoder = make_encoder(backbone.tokenizer)
    vocabulary = len(backbone.table)
    train = make_rows(256, vocabulary, setting.shortest, setting.longest)
    validation = make_rows(8, vocabulary, setting.shortest, setting.longest, seed=1)
    spec = TrainSpec(batch_size=setting.batch, steps=2 * steps, evaluate_every=steps)
    engine = Engine(
        backbone, Task(encoder, {"train": train, "validation": validation}), spec, SearchSpec(), 64
    )
    for trial in range(setting.trials):
        engine.seat(f"trial {trial}", TrialSpec("random", None, setting.prompt, 0.1, trial))
    return engine


@contextmanager
def _watched(watch: Stopwatch, backbone: CausalBackbone, engine: Engine) -> Iterator[None]:
    """Time the functions of the parts with the stopwatch while the context is open."""
    body = backbone.model.base_model
    watched: list[tuple[Any, str, str]] = [
        (engine, "step", "steps"),
        (engine_module, "evaluate", "evaluation"),
        (engine_module, "apply_all", "optimiser"),
        (engine_module, "step_rows", "data"),
        (step_module, "pack", "data"),
        (step_module, "length_groups", "data"),
        (Rows, "pad", "data"),
        (step_module, "target_log_probs", "model"),
        (torch.autograd, "backward", "model"),
        (backbone.model, "forward", "model"),
        (body, "forward", "model"),
    ]
    with ExitStack() as stack:
        for owner, attribute, part in watched:
            stack.enter_context(
                patch.object(owner, attribute, watch.around(part, getattr(owner, attribute)))
            )
        yield
