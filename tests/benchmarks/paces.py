"""Seconds of a training step and of an evaluation with each method, alone on one core.

All methods run in one process, on the same model and rows, and take turns, so that the machine's
drift affects all of them. Whole searches can't be compared this way, since they run minutes apart.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.job.spec import JobSpec
from orchestrator.models.backbone import Backbone, load_backbone
from orchestrator.tuning.engine import Engine, Slot
from orchestrator.tuning.make import make_engine
from tests.benchmarks import methods
from tests.benchmarks.jobs import random_model
from tests.benchmarks.measure import Line, seconds

FIRST = "prompt_tuning"
"""The method that the others are compared with."""


@dataclass(frozen=True)
class Setting:
    """``steps`` of a turn, and ``turns`` of each method."""

    data: dict[str, Callable[[Path], dict[str, Any]]] = field(
        default_factory=lambda: methods.Setting().data
    )
    steps: int = 5
    turns: int = 9


SETTINGS = {"real": Setting(), "small": Setting({"random": random_model}, steps=1, turns=2)}


@dataclass(frozen=True)
class Runner:
    """The only trial of one method."""

    engine: Engine
    slot: Slot

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step([self.slot])

    def evaluate(self) -> None:
        self.engine.reports([self.slot])


def lines(setting: Setting, only: str = "") -> list[Line]:
    """Return a line for each method on each data set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            line
            for name, make in setting.data.items()
            for line in _of_data(setting, name, make, only)
        ]
    finally:
        torch.set_num_threads(threads)


def _of_data(
    setting: Setting, name: str, make: Callable[[Path], dict[str, Any]], only: str
) -> list[Line]:
    chosen = [method for method in methods.RATES if only in f"{name} {method}" or method == FIRST]
    with tempfile.TemporaryDirectory(prefix="paces-") as scratch:
        runners = runners_of(make(Path(scratch)), chosen)
    trained: dict[str, list[float]] = {method: [] for method in runners}
    evaluated: dict[str, list[float]] = {method: [] for method in runners}
    for runner in runners.values():
        runner.train(1)
    for _ in range(setting.turns):
        for method, runner in runners.items():
            trained[method].append(
                seconds(lambda runner=runner: runner.train(setting.steps)) / setting.steps
            )
            evaluated[method].append(seconds(runner.evaluate))
    return [_line(f"{name}, {method}", method, trained, evaluated) for method in runners]


def runners_of(base: dict[str, Any], chosen: list[str]) -> dict[str, Runner]:
    from orchestrator.search.prepare import prepare

    backbone: Backbone | None = None
    runners = {}
    for method in chosen:
        document = {
            **methods.job(base, method, methods.Setting()),
            "name": method.replace("_", "-"),
        }
        made = prepare(JobSpec.model_validate(document))
        backbone = backbone or load_backbone(made.source)
        engine = make_engine(backbone, made.task, made.job.train, made.job.search, capacity=1)
        engine.seat(method, made.trials[0])
        runners[method] = Runner(engine, engine.slots[method])
    return runners


def _line(
    name: str, method: str, trained: dict[str, list[float]], evaluated: dict[str, list[float]]
) -> Line:
    ratios = [one / first for one, first in zip(trained[method], trained[FIRST], strict=True)]
    shown: dict[str, float | str] = {
        "step, ms": 1000 * statistics.median(trained[method]),
        "times prompt tuning's": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "evaluation, ms": 1000 * statistics.median(evaluated[method]),
    }
    return Line(
        name,
        shown,
        {"steps, s": trained[method], "evaluations, s": evaluated[method], "ratios": ratios},
    )
