"""The decisions of population based training, without a search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.study.population import FACTORS, CopyDecision, Population
from orchestrator.tuning.reports import Report

RATES = [0.01, 0.1, 1.0]


def job(metric: str = "accuracy", rates: Any = RATES, trials: int = 8, every: int = 10) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "population",
            "base_model": {"id": "none"},
            "data": {
                "path": "none",
                "template": "{text}",
                "target": "label",
                "verbalizer": {0: "no", 1: "yes"},
            },
            "search": {
                "space": {
                    "init": ["random", "sample_vocab"],
                    "num_virtual_tokens": [5, 20],
                    "learning_rate": rates,
                },
                "scheduler": "pbt",
                "perturbation_steps": every,
                "metric": metric,
                "trials": trials,
            },
            "train": {"steps": 100, "evaluate_every": 10},
        }
    )


def spec(number: int, rate: float = 0.1) -> TrialSpec:
    return TrialSpec("random" if number % 2 else "sample_vocab", None, 5 + number, rate, number)


def report(number: int, score: float, step: int = 10, loss: float = 1.0) -> Report:
    metrics = {"accuracy": score, "loss": loss}
    name = f"t{number}"
    return Report(name, step, metrics, 1.0, step, metrics, score, f"{name}@{step}".encode())


def copies(
    population: Population, scores: list[float], step: int = 10, first: int = 0
) -> list[CopyDecision]:
    """Return the copies of a round in which every trial reports and goes on."""
    reports = [
        (report(first + place, score, step), spec(first + place))
        for place, score in enumerate(scores)
    ]
    return population.copies(reports, [one.trial for one, _ in reports])


@pytest.mark.parametrize(
    ("scores", "copying", "sources"),
    [
        ([0.5, 0.9], {"t0"}, {"t1"}),
        ([0.1, 0.2, 0.3, 0.4], {"t0"}, {"t3"}),
        ([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], {"t6", "t7"}, {"t0", "t1"}),
        ([0.5], set(), set()),
        ([0.5, 0.5, 0.5, 0.5], set(), set()),
    ],
    ids=["two", "four", "eight", "one", "equal"],
)
def test_the_worst_quarter_copies_the_best_quarter(
    scores: list[float], copying: set[str], sources: set[str]
) -> None:
    """A trial that is alone, or as good as the best, copies nothing."""
    found = copies(Population(job()), scores)
    assert {copy.trial for copy in found} == copying
    assert {copy.copied.source for copy in found} <= sources
    assert all(copy.checkpoint == f"{copy.copied.source}@10".encode() for copy in found)


def test_lower_is_better_where_the_metric_says_so() -> None:
    """With metric loss, the trial of the highest loss copies that of the lowest."""
    (copy,) = copies(Population(job("loss")), [0.5, 0.9])
    assert (copy.trial, copy.copied.source) == ("t1", "t0")


def test_the_loss_decides_between_equal_scores() -> None:
    """Equal scores are ranked by the loss, as everywhere else in a search."""
    reports = [
        (report(number, 0.5, loss=loss), spec(number)) for number, loss in enumerate([1.0, 2.0])
    ]
    (copy,) = Population(job()).copies(reports, ["t0", "t1"])
    assert (copy.trial, copy.copied.source) == ("t1", "t0")


def test_a_copy_has_the_prompt_of_its_source_and_its_own_seed() -> None:
    """A copy takes over init and length; it keeps its own seed, which orders the rows."""
    (copy,) = copies(Population(job()), [0.5, 0.9])
    assert replace(copy.copied.spec, learning_rate=0.1) == replace(spec(1), seed=0)
    assert copy.copied.step == 10


@pytest.mark.parametrize("rates", [RATES, {"loguniform": [0.01, 1.0]}, {"uniform": [0.01, 1.0]}])
@pytest.mark.parametrize(
    ("rate", "allowed"), [(0.1, {0.08, 0.12}), (1.0, {0.8}), (0.01, {0.012}), (0.9, {0.72, 1.0})]
)
def test_a_copy_has_another_learning_rate_of_the_space(
    rates: Any, rate: float, allowed: set[float]
) -> None:
    """The source's rate is changed by a fifth, up or down, within the space, and never stays the
    same."""
    found = set()
    for number in range(20):
        reports = [(report(number, 0.1), spec(number)), (report(99, 0.9), spec(99, rate))]
        (copy,) = Population(job(rates=rates)).copies(reports, [f"t{number}"])
        found.add(round(copy.copied.spec.learning_rate, 6))
    assert found == allowed
    assert FACTORS == (0.8, 1.2)


def test_only_every_so_many_steps() -> None:
    """Nothing is copied between two comparisons."""
    population = Population(job(every=20))
    assert copies(population, [0.5, 0.9], step=10) == []
    assert [copy.trial for copy in copies(population, [0.5, 0.9], step=20)] == ["t0"]


def test_late_trials_are_compared_at_the_same_step() -> None:
    """A trial that starts late copies a checkpoint of its own step, not a later one."""
    population = Population(job())
    for step, gain in ((10, 0.0), (20, 0.1)):
        copies(population, [0.6 + gain, 0.7 + gain, 0.8 + gain, 0.9], step)
    (copy,) = copies(population, [0.3], step=10, first=4)
    assert copy.trial == "t4" and copy.copied.step == 10 and copy.checkpoint in (b"t2@10", b"t3@10")


def test_who_does_not_go_on_copies_nothing_but_may_be_copied() -> None:
    """A trial that ended in this round can be copied; one that diverged can not."""
    population = Population(job())
    broken = replace(report(2, 0.99), metrics={}, ending="diverged")
    found = population.copies(
        [(report(0, 0.1), spec(0)), (report(1, 0.9), spec(1)), (broken, spec(2))], ["t0"]
    )
    assert [(copy.trial, copy.copied.source) for copy in found] == [("t0", "t1")]


def test_only_checkpoints_that_may_be_copied_are_kept() -> None:
    """Checkpoints are kept for the best quarter of all trials at each step, as reports come in."""
    population = Population(job(trials=8))
    for number, score in enumerate([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]):
        copies(population, [score], first=number)
    kept = [member.trial for member in population._members[10] if member.checkpoint]
    assert kept == ["t7", "t6"]
