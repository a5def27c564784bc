"""The simulated course of a search: exact without early stopping, and with Tune's decisions."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.search.plan.forecast import Pace, forecast, rungs, stopping_rule
from orchestrator.search.study.study import scheduler

PACE = Pace(
    step_alone=1.0, step_packed=1.5, evaluation_alone=10.0, evaluation_packed=13.0, packed=3
)
FIFO = SearchSpec(scheduler="fifo")


class TuneTrial:
    """The attributes of a trial that a scheduler reads."""

    def __init__(self, name: int) -> None:
        self.trial_id = str(name)


def rays(search: SearchSpec, train: TrainSpec) -> TrialScheduler:
    """Return the Tune scheduler of a search."""
    job: Any = SimpleNamespace(search=search, train=train)
    return scheduler(job)


@pytest.mark.parametrize("name", ["asha", "median"])
@pytest.mark.parametrize(
    ("steps", "every", "grace", "factor"),
    [(120, 20, None, 3), (81, 1, 1, 3), (100, 30, 10, 2), (243, 5, 27, 4)],
)
def test_trials_stop_as_ray_tune_stops_them(
    name: str, steps: int, every: int, grace: int | None, factor: int
) -> None:
    """The simulation and Tune's scheduler decide the same at every report.

    Rungs that no evaluation falls on and repeated values are included.
    """
    search = SearchSpec(scheduler=name, grace_steps=grace, reduction_factor=factor)  # type: ignore[arg-type]
    train = TrainSpec(steps=steps, evaluate_every=every)
    ours, theirs = stopping_rule(search, train), rays(search, train)
    controller: Any = SimpleNamespace(get_live_trials=list)
    choose = random.Random(steps)
    trials = [TuneTrial(number) for number in range(12)]
    score = {trial: choose.randrange(8) / 8 for trial in trials}
    at = dict.fromkeys(trials, 0)
    for trial in trials:
        theirs.on_trial_add(controller, trial)  # type: ignore[arg-type]
    stopped = 0
    while at:
        trial = choose.choice(list(at))
        at[trial] = min(steps, at[trial] + every)
        result = {
            "step": at[trial],
            "score": score[trial],
            "training_iteration": 1,
            "time_total_s": 1.0,
        }
        goes_on = theirs.on_trial_result(controller, trial, result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
        if at[trial] == steps:
            goes_on = False
            ours(trials.index(trial), at[trial], score[trial])
        else:
            assert ours(trials.index(trial), at[trial], score[trial]) == goes_on
            stopped += not goes_on
        if not goes_on:
            del at[trial]
    assert stopped


@pytest.mark.parametrize(
    ("steps", "grace", "factor"), [(120, 20, 3), (81, 1, 3), (100, 10, 2), (243, 3, 3), (5, 5, 2)]
)
def test_rungs_are_those_of_ray_tune(steps: int, grace: int, factor: int) -> None:
    """The steps at which trials may stop, and the last step."""
    search = SearchSpec(grace_steps=grace, reduction_factor=factor)
    theirs: Any = rays(search, TrainSpec(steps=steps))
    milestones = [milestone for milestone, _ in theirs._brackets[0]._rungs]
    assert rungs(search, TrainSpec(steps=steps)) == tuple(sorted({*milestones, steps}))
    assert rungs(FIFO, TrainSpec(steps=steps)) == (steps,)


def test_without_early_stopping_the_seconds_are_exact() -> None:
    """Without early stopping the seconds are exact.

    Four trials on three slots: three run together, then one alone; each takes 5 steps, with
    evaluations after steps 2, 4 and 5.
    """
    found = forecast(FIFO, TrainSpec(steps=5, evaluate_every=2), 4, 1, 3, PACE, report_s=0.5)
    together = 5 * 1.5 + 3 * (13.0 + 1.5)
    alone = 5 * 1.0 + 3 * (10.0 + 0.5)
    assert found.seconds == pytest.approx(together + alone) and found.spread == (
        found.seconds,
        found.seconds,
    )
    assert (found.steps, found.reports, found.rungs, found.reached) == (20, 12, (5,), (4,))


def test_workers_share_the_trials() -> None:
    """Two workers of one slot train two trials each, in parallel."""
    pace = Pace(1.0, 1.0, 10.0, 10.0, 1)
    one = forecast(FIFO, TrainSpec(steps=4, evaluate_every=4), 4, 1, 1, pace).seconds
    two = forecast(FIFO, TrainSpec(steps=4, evaluate_every=4), 4, 2, 1, pace).seconds
    assert (one, two) == (4 * 14.0, 2 * 14.0)


def test_a_pace_between_one_and_all_slots() -> None:
    """The pace of two trials is interpolated halfway between those of one and three."""
    assert [PACE.step(count) for count in (1, 2, 3)] == [1.0, 1.25, 1.5]
    assert PACE.evaluation(2) == 11.5


def test_early_stopping_saves_steps_and_always_as_many() -> None:
    """With ASHA all trials reach the first rung and fewer each later one.

    Two estimates of the same search are equal.
    """
    search, train = SearchSpec(reduction_factor=3), TrainSpec(steps=90, evaluate_every=10)
    found = forecast(search, train, 40, 1, 4, PACE)
    assert found == forecast(search, train, 40, 1, 4, PACE)
    assert found.rungs == (10, 30, 90) and found.reached[0] == 40
    assert (
        40 / 3 < found.reached[1] < 40
        and found.reached[1] / 3 < found.reached[2] < found.reached[1]
    )
    assert 40 * 10 < found.steps < 40 * 90
    assert found.spread[0] < found.seconds < found.spread[1]


def test_two_trials_by_hand() -> None:
    """Two trials run in turn under ASHA.

    The first one finishes; the second finishes only if it is better, which is in about half of the
    draws.
    """
    found = forecast(
        SearchSpec(), TrainSpec(steps=20, evaluate_every=10, batch_size=1), 2, 1, 1, PACE
    )
    assert found.reached[0] == 2 and 1.25 < found.reached[-1] < 1.75
    assert found.steps == pytest.approx(2 * 10 + 10 * found.reached[-1])
