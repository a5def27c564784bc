"""Records of a study, and their order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.search.state.trials import Outcome
from orchestrator.tuning.reports import Copied, Report

SPEC = TrialSpec("random", None, 5, 0.1, 0)
OTHER = TrialSpec("sample_vocab", None, 20, 0.12, 0)


def report(trial: str, step: int, best_step: int, accuracy: float, loss: float = 1.0) -> Report:
    metrics = {"accuracy": accuracy, "loss": loss}
    return Report(
        trial, step, metrics, 1.0, best_step, metrics, accuracy, f"{trial}@{step}".encode()
    )


def order(outcome: Outcome) -> list[str]:
    return [record.id for record in outcome.ranking()]


def test_trials_that_nobody_knew_of_get_a_record_when_they_start() -> None:
    """After those known beforehand, in the order in which they start."""
    outcome = Outcome(SearchSpec(), [("t000", SPEC)])
    outcome.trial_started("t001", OTHER)
    outcome.trial_started("t000", SPEC)
    assert list(outcome.records) == ["t000", "t001"]
    assert {record.status for record in outcome.records.values()} == {"running"}
    assert outcome.records["t001"].spec == OTHER


def test_where_a_worker_was_is_known_when_it_is_gone() -> None:
    """From its reports: the place of the last one."""
    outcome = Outcome(SearchSpec(), [("a", SPEC)])
    for worker, node in (("w0", "n1"), ("w1", "n2"), ("w0", "n3")):
        outcome.trial_reported(
            "a", replace(report("a", 4, 4, 0.5), worker=worker, place={"node": node})
        )
    outcome.trial_reported(
        "a", replace(report("a", 8, 4, 0.5), worker="w1")
    )  # of a journal from before there were any
    assert outcome.places == {"w0": {"node": "n3"}, "w1": {"node": "n2"}}
    assert outcome.records["a"].workers == ["w0", "w1", "w0", "w1"]


def test_the_metric_ranks_then_the_loss_then_the_order() -> None:
    """Best first."""
    outcome = Outcome(SearchSpec(), [(name, SPEC) for name in ("a", "b", "c", "d")])
    for name, accuracy, loss in (
        ("d", 0.5, 1.0),
        ("a", 0.5, 1.0),
        ("b", 0.5, 0.9),
        ("c", 0.6, 2.0),
    ):
        outcome.trial_reported(name, report(name, 4, 4, accuracy, loss))
    assert order(outcome) == ["c", "b", "a", "d"]


def test_a_copy_has_its_new_configuration_and_its_history() -> None:
    """From the first report on that the copied prompt gave."""
    outcome = Outcome(SearchSpec(), [("a", SPEC), ("b", SPEC)])
    outcome.trial_reported("a", report("a", 4, 4, 0.5))
    assert "copied" not in outcome.records["a"].document()
    outcome.trial_reported("a", replace(report("a", 8, 8, 0.7), copied=Copied("b", 4, OTHER)))
    document = outcome.records["a"].document()
    assert document["config"] == OTHER.config()
    assert document["copied"] == [{"trial": "b", "step": 4, "learning_rate": 0.12}]


def test_a_prompt_is_ranked_once() -> None:
    """A copy that found nothing better than what it copied is left out beside its source; it counts once it has, and
    where the source is not ranked."""
    outcome = Outcome(SearchSpec(), [("a", SPEC), ("b", OTHER)])
    outcome.trial_reported("b", report("b", 4, 4, 0.7))
    outcome.trial_reported("a", replace(report("a", 8, 4, 0.7), copied=Copied("b", 4, OTHER)))
    assert order(outcome) == ["b"]
    outcome.trial_ended("b", "failed", "diverged at step 8")
    assert order(outcome) == ["a"]
    outcome.trial_ended("b", "finished", "")
    outcome.trial_reported("a", report("a", 12, 12, 0.8))
    assert order(outcome) == ["a", "b"]


def test_the_spread_over_seeds_is_of_equal_trials() -> None:
    """Those that differ in the seed alone and came as far; nothing where there is no other."""
    seeds = {f"s{seed}": replace(SPEC, seed=seed) for seed in range(4)}
    outcome = Outcome(SearchSpec(), [*seeds.items(), ("other", OTHER)])
    for name, accuracy, step in (
        ("s0", 0.5, 8),
        ("s1", 0.7, 8),
        ("s2", 0.6, 8),
        ("s3", 0.1, 4),
        ("other", 0.9, 8),
    ):
        outcome.trial_reported(name, report(name, step, step, accuracy))
    found = outcome.over_seeds(outcome.records["s1"])
    assert found["trials"] == 3
    assert found["validation"]["accuracy"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
    }
    assert outcome.over_seeds(outcome.records["other"]) == {}
