"""The records of a study and their ranking."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.search.report.facts import TrialFacts
from orchestrator.search.state.ranking import ranked
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
    """Proposed trials get their records after the known ones, in the order in which they start."""
    outcome = Outcome(SearchSpec(), [("t000", SPEC)])
    outcome.trial_started("t001", OTHER)
    outcome.trial_started("t000", SPEC)
    assert list(outcome.records) == ["t000", "t001"]
    assert {record.status for record in outcome.records.values()} == {"running"}
    assert outcome.records["t001"].spec == OTHER


def test_where_a_worker_was_is_known_when_it_is_gone() -> None:
    """A worker's place is the one in its last report with a place."""
    outcome = Outcome(SearchSpec(), [("a", SPEC)])
    for worker, node in (("w0", "n1"), ("w1", "n2"), ("w0", "n3")):
        outcome.trial_reported(
            "a", replace(report("a", 4, 4, 0.5), worker=worker, place={"node": node})
        )
    outcome.trial_reported(
        "a", replace(report("a", 8, 4, 0.5), worker="w1")
    )  # as from a journal of an earlier release, which has no places
    assert outcome.places == {"w0": {"node": "n3"}, "w1": {"node": "n2"}}
    assert outcome.records["a"].workers == ["w0", "w1", "w0", "w1"]


def test_the_metric_ranks_then_the_loss_then_the_order() -> None:
    """Trials are ranked by the metric, then by the loss, then in their order."""
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
    """A record names a copy and its configuration from the copy's first report on."""
    outcome = Outcome(SearchSpec(), [("a", SPEC), ("b", SPEC)])
    outcome.trial_reported("a", report("a", 4, 4, 0.5))
    assert "copied" not in outcome.records["a"].document()
    outcome.trial_reported("a", replace(report("a", 8, 8, 0.7), copied=Copied("b", 4, OTHER)))
    document = outcome.records["a"].document()
    assert document["config"] == OTHER.config()
    assert document["copied"] == [{"trial": "b", "step": 4, "learning_rate": 0.12}]


def test_a_prompt_is_ranked_once() -> None:
    """A copy without a better result of its own is left out beside its source.

    It is ranked once it has improved, or when its source is not ranked.
    """
    outcome = Outcome(SearchSpec(), [("a", SPEC), ("b", OTHER)])
    outcome.trial_reported("b", report("b", 4, 4, 0.7))
    outcome.trial_reported("a", replace(report("a", 8, 4, 0.7), copied=Copied("b", 4, OTHER)))
    assert order(outcome) == ["b"]
    outcome.trial_ended("b", "failed", "diverged at step 8")
    assert order(outcome) == ["a"]
    outcome.trial_ended("b", "finished", "")
    outcome.trial_reported("a", report("a", 12, 12, 0.8))
    assert order(outcome) == ["a", "b"]


def test_the_report_ranks_as_the_search_does() -> None:
    """A copy without a better result of its own is left out of the report's ranking too."""
    best = {"accuracy": 0.7, "loss": 1.0}
    source = TrialFacts("b", OTHER, best=best, best_step=4)
    copy = TrialFacts("a", SPEC, best=best, best_step=4, copied_step=4)
    assert [trial.id for trial in ranked([copy, source], SearchSpec())] == ["b"]
    source.status = "failed"
    assert [trial.id for trial in ranked([copy, source], SearchSpec())] == ["a"]


def test_the_spread_over_seeds_is_of_equal_trials() -> None:
    """Only trials that differ in the seed alone and trained as many steps are compared.

    The result is empty when there is no such trial.
    """
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
