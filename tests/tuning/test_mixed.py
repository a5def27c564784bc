"""Trials of several methods on one model: each has the numbers of a search of its method alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import load, model_folder
from small_jobs import small_job

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import PROMPT_METHODS
from orchestrator.models.backbone import Backbone
from orchestrator.search.plan.forecast import Pace
from orchestrator.search.plan.measure import _mean, _share, measure
from orchestrator.search.plan.plan import estimate
from orchestrator.search.prepare import Prepared, prepare
from orchestrator.search.workers.placement import Placement
from orchestrator.tuning.engine import Engine
from orchestrator.tuning.make import make_engine, make_engines
from orchestrator.tuning.meter import Meter
from orchestrator.tuning.mixed import MixedEngine
from orchestrator.tuning.reports import EvaluationJob, Report

RATES = [0.003, 0.01]
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": [2, 5], "learning_rate": [0.1]},
    "lora": {"rank": [2, 4], "learning_rate": [0.01]},
    "prefix_tuning": {"num_virtual_tokens": [2], "learning_rate": [0.01]},
    "model_tuning": {"learning_rate": [0.001]},
    "adapter": {"bottleneck": 4, "learning_rate": [0.01]},
    "prompt_design": {"shots": [0, 1]},
}
SEATS = 12


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(model_folder())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A job that mixes six methods, with nine trials."""
    job = small_job(
        tmp_path_factory.mktemp("mixed"),
        search__space={"seed": 3, "method": METHODS},
        search__searcher="grid",
        search__trials=9,
        train__steps=8,
    )
    return prepare(job)


def make(prepared: Prepared, backbone: Backbone) -> MixedEngine:
    job = prepared.job
    made = make_engines(backbone, prepared.task, job.train, job.search, SEATS)
    assert isinstance(made, MixedEngine) and made.capacity == SEATS
    return made


@pytest.fixture
def engine(prepared: Prepared, backbone: Backbone) -> MixedEngine:
    return make(prepared, backbone)


@pytest.fixture(scope="module")
def reports(prepared: Prepared, backbone: Backbone) -> list[Report]:
    """The reports of all trials, which were seated side by side."""
    engine = make(prepared, backbone)
    for name, spec in names(prepared).items():
        engine.seat(name, spec)
    return list(run_out(engine))


def names(prepared: Prepared) -> dict[str, TrialSpec]:
    return {f"t{number}": spec for number, spec in enumerate(prepared.trials)}


def run_out(engine: Engine | MixedEngine) -> Iterator[Report]:
    while reports := engine.round():
        yield from reports


def alone(prepared: Prepared, backbone: Backbone, method: str) -> list[Report]:
    """Return the reports of a job of the method alone, on the same data."""
    job = small_job(
        Path(prepared.job.data.path.train).parent,  # type: ignore[union-attr,arg-type]
        method=method,
        search__space={"seed": 3, **METHODS[method]},
        search__searcher="grid",
        search__trials=9,
        **({"train": {}} if method == "prompt_design" else {"train__steps": 8}),
    )
    inputs = prepare(job)
    packed = method in PROMPT_METHODS
    numbers = [name for name, spec in names(prepared).items() if spec.method == method]
    assert inputs.trials == [replace(names(prepared)[name], method="") for name in numbers]
    engine = make_engine(backbone, inputs.task, job.train, job.search, SEATS)
    reports: list[Report] = []
    for group in [numbers] if packed else [[name] for name in numbers]:
        for name in group:
            engine.seat(name, replace(names(prepared)[name], method=""))
        reports += run_out(engine)
    return reports


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_is_the_same_as_in_a_search_of_its_method_alone(
    prepared: Prepared, backbone: Backbone, reports: list[Report], method: str
) -> None:
    """Every report has the same metrics and loss, and every checkpoint the same bytes."""
    specs = names(prepared)
    mixed = {(it.trial, it.step): it for it in reports if specs[it.trial].method == method}
    single = {(it.trial, it.step): it for it in alone(prepared, backbone, method)}
    assert mixed.keys() == single.keys() and len(single) >= 2 - (method == "prompt_design")
    for key, report in single.items():
        found = mixed[key]
        assert (found.metrics, found.ending) == (report.metrics, report.ending)
        assert found.checkpoint == report.checkpoint
        assert found.costs.parameters == report.costs.parameters
        assert found.costs.stored_bytes == report.costs.stored_bytes


def test_the_model_is_as_it_was_after_a_mixed_round(
    prepared: Prepared, engine: MixedEngine
) -> None:
    """The untuned model has the same loss between rounds in which baselines changed it."""
    before, bare = engine.backbone.digest(), engine.evaluate(EvaluationJob("validation"))
    for name, spec in names(prepared).items():
        engine.seat(name, spec)
    engine.round()
    assert engine.backbone.digest() == before
    assert engine.evaluate(EvaluationJob("validation")) == bare


def test_each_trial_is_evaluated_by_its_own_method(
    prepared: Prepared, engine: MixedEngine, reports: list[Report]
) -> None:
    """The checkpoint of each trial gives the metrics again that its report has."""
    last = {report.trial: report for report in reports}
    assert last.keys() == names(prepared).keys()
    for name, spec in names(prepared).items():
        job = EvaluationJob("validation", last[name].checkpoint, spec=spec)
        again = engine.evaluate(job)
        assert again["loss"] == pytest.approx(last[name].best_metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_baselines_wait_as_checkpoints_while_another_one_trains(
    prepared: Prepared, engine: MixedEngine, count: int
) -> None:
    """After a round of several baselines none of them is in memory; a single one stays there."""
    specs = names(prepared)
    baselines = [name for name, spec in specs.items() if spec.method in ("lora", "model_tuning")]
    for name in baselines[:count]:
        engine.seat(name, specs[name])
    assert len(engine.round()) == count
    held = [trial for each in engine._engines.values() for trial in each.slots]
    assert held == (baselines[:1] if count == 1 else [])


def test_a_freed_trial_leaves_its_seat(prepared: Prepared, engine: MixedEngine) -> None:
    """There are as many seats as the capacity, whatever the methods; a freed one can be taken."""
    specs = list(names(prepared).values())
    for number in range(SEATS):
        engine.seat(f"s{number}", specs[number % len(specs)])
    with pytest.raises(RuntimeError, match="no slot is free"):
        engine.seat("more", specs[0])
    engine.free("s0")
    engine.free("unknown")
    engine.seat("more", specs[1])
    assert {report.trial for report in engine.round()} == {
        "more",
        *(f"s{n}" for n in range(1, SEATS)),
    }


class Spans(Meter):
    """A meter that records which trials train together."""

    def __init__(self) -> None:
        self.together: list[set[str]] = []

    def start(self, trials: Any, subject: str = "") -> None:
        self.together.append(set(trials))


def test_only_trials_of_one_prompt_method_are_packed(
    prepared: Prepared, engine: MixedEngine
) -> None:
    """Prompts of one method take their steps together; each baseline takes them alone."""
    engine.meter = spans = Spans()
    specs = names(prepared)
    for name, spec in specs.items():
        engine.seat(name, spec)
    engine.round()
    for group in spans.together:
        methods = {specs[name].method for name in group}
        assert len(methods) == 1 and (len(group) == 1 or methods <= set(PROMPT_METHODS))
    assert {
        name for name, spec in specs.items() if spec.method == "prompt_tuning"
    } in spans.together


def test_a_trial_goes_on_from_its_checkpoint_beside_other_methods(
    prepared: Prepared, engine: MixedEngine, reports: list[Report]
) -> None:
    """Trials of all methods that are moved to another worker end as if they had stayed."""
    first = {report.trial: report for report in reversed(reports)}
    last = {report.trial: report for report in reports if report.step == 8}
    assert len(last) == 7
    for name in last:
        engine.seat(name, names(prepared)[name], first[name].checkpoint)
    moved = {report.trial: report for report in run_out(engine)}
    assert moved.keys() == last.keys()
    assert all(moved[name].metrics == last[name].metrics for name in last)


def test_the_plan_of_several_methods_counts_each_with_its_share(prepared: Prepared) -> None:
    """The mean of paces weighs each method by its trials; full workers take a step of each."""
    placement = Placement(1, 1, 0.0, 1, 6)
    parts = prepared.parts
    assert [part.job.methods for part in parts] == [(method,) for method in METHODS]
    assert [part.total for part in parts] == [2, 2, 1, 1, 1, 2]
    seats = [_share(part, prepared.total, placement).trials_per_worker for part in parts]
    assert seats == [1, 1, 1, 1, 1, 1]
    packed, single = Pace(1.0, 2.0, 0.1, 0.2, 4), Pace(3.0, 3.0, 0.3, 0.3, 1)
    mean = _mean([packed, single], [4, 2], placement)
    assert mean.step(1) == pytest.approx((4 * 1.0 + 2 * 3.0) / 6)
    assert mean.step(6) == pytest.approx(2.0 + 2 * 3.0)
    assert _mean([packed], [4], placement) == packed


@pytest.mark.long
def test_the_plan_measures_every_method(prepared: Prepared) -> None:
    """A child process measures steps and evaluations of all methods, and the largest memory."""
    placement = Placement(1, 1, 0.0, 1, 2)
    measured = measure(prepared, placement)
    pace = measured.pace
    assert pace.packed == 2 and 0 < pace.step_alone < pace.step_packed
    assert 0 < pace.evaluation_alone < pace.evaluation_packed
    assert measured.weights <= measured.idle <= measured.usual <= measured.peak
    plan = estimate(prepared, placement, measured)
    assert plan.trials == prepared.total == 9 and plan.seconds["search"] > 0
