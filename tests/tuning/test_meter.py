"""The meter counts the steps and rows of every kind of work, and tells them now and then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import backbone_of, small_task, tiny_backbone

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import MethodName, SearchSpec, TrainSpec
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.engine import Engine
from orchestrator.tuning.forwards import SharedForwards
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.meter import Reading, Span, TellingMeter
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.reports import EvaluationJob
from orchestrator.tuning.worker_group import Group

TRAIN = TrainSpec(steps=5, batch_size=4, evaluate_every=3)
PROMPT = TrialSpec("random", None, 3, 0.1, 0)


class Told:
    """The readings of an engine whose meter tells every one."""

    def __init__(self, engine: Engine) -> None:
        self.readings: list[Reading] = []
        engine.meter = TellingMeter(self.readings.append, every=0.0)

    def taken(self) -> dict[str, Reading]:
        """Return the last reading of each phase since the last call."""
        last: dict[str, Reading] = {reading.phase: reading for reading in self.readings}
        self.readings.clear()
        return last


def test_a_round_counts_its_steps_then_the_rows_of_its_evaluation() -> None:
    """The trials of a round advance together, and the last round is as short as it is."""
    engine = Engine(tiny_backbone(), small_task(), TRAIN, SearchSpec(metric="loss"), capacity=2)
    rows = len(engine.task.splits["validation"])
    told = Told(engine)
    engine.seat("a", PROMPT)
    engine.seat("b", replace(PROMPT, seed=1))
    engine.round()
    assert [reading.done for reading in told.readings if reading.phase == "training"] == [1, 2, 3]
    phases = told.taken()
    assert phases["training"].trials == {"a": Span(0, 3), "b": Span(0, 3)}
    assert phases["training"].step_of("b") == phases["evaluating"].step_of("b") == 3
    assert (phases["evaluating"].done, phases["evaluating"].total) == (rows, rows)
    engine.round()
    last = told.taken()["training"]
    assert (last.done, last.total, last.step_of("a")) == (2, 2, 5)


def test_an_evaluation_counts_the_rows_of_its_split() -> None:
    """Evaluations outside rounds name their subject and have no trials."""
    engine = Engine(tiny_backbone(), small_task(), TRAIN, SearchSpec(metric="loss"), capacity=1)
    told = Told(engine)
    engine.evaluate(EvaluationJob("test"))
    reading = told.taken()["evaluating"]
    assert (reading.done, reading.subject) == (len(engine.task.splits["test"]), "no prompt on test")
    assert not reading.trials


def test_generated_texts_are_counted_too() -> None:
    """A metric of texts runs over the rows a second time, which is a phase of its own."""
    task = small_task(None, train=8, validation=4)
    split = task.splits["validation"]
    task.splits["validation"] = replace(split, references=[["no"]] * len(split))
    task.decoding = Decoding(3)
    engine = Engine(tiny_backbone(), task, TRAIN, SearchSpec(metric="loss"), capacity=1)
    told = Told(engine)
    engine.evaluate(EvaluationJob("validation"))
    phases = told.taken()
    assert list(phases) == ["evaluating", "generating"]
    assert [reading.done for reading in phases.values()] == [4, 4]


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("model_tuning", {}),
        ("lora", {"rank": 2, "alpha": 4}),
        ("adapter", {"bottleneck": 4}),
    ],
)
def test_baseline_methods_count_as_prompts_do(method: MethodName, change: dict[str, int]) -> None:
    """Model tuning, LoRA and adapters tell steps and rows as well."""
    task = small_task()
    task.method = Method(method)
    search = SearchSpec(metric="loss")
    engine = make_engine(backbone_of("llama", torch.float32), task, TRAIN, search, capacity=1)
    told = Told(engine)
    engine.seat("a", replace(TrialSpec("", None, 0, 0.01, 0), **change))
    engine.round()
    phases = told.taken()
    assert (phases["training"].done, phases["training"].total) == (3, 3)
    assert phases["evaluating"].done == len(task.splits["validation"])


class FirstOfTwo(Group):
    """The first worker of a group of two, alone."""

    size = 2

    def share(self, places):  # type: ignore[no-untyped-def]
        return places[:: self.size]


@pytest.mark.parametrize("ways", [1, 3])
def test_the_first_worker_of_a_group_counts_for_all(ways: int) -> None:
    """Its rows stand for those of the others, and threads side by side add up."""
    readings: list[Reading] = []
    meter = TellingMeter(readings.append, every=0.0)
    meter.begin("evaluating", 9)
    threads = Threads(ways, ways)
    forwards = SharedForwards([range(6), range(6, 9)], [1] * 9, FirstOfTwo(), threads, 1, meter)
    forwards.run(list, lambda share, rows: rows.extend(share.rows))
    assert (readings[-1].done, readings[-1].total) == (9, 9)


def test_readings_are_told_at_most_every_so_often() -> None:
    """The clock decides; what was done in between is in the next reading."""
    readings: list[Reading] = []
    now = [0.0]
    meter = TellingMeter(readings.append, every=1.5, clock=lambda: now[0])
    meter.start({"a": Span(0, 100)})
    meter.begin("training", 100)
    for _ in range(100):
        now[0] += 0.125
        meter.add()
    assert [reading.done for reading in readings] == list(range(12, 101, 12))
    assert {reading.rate for reading in readings} == {8.0}
