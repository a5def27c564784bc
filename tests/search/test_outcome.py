"""The records of a study and their ranking."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_jobs import small_job

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.registry import SEEDS_TAG, VersionSummary
from orchestrator.registry.runs.entries import as_texts
from orchestrator.search.report import read_facts
from orchestrator.search.result import seed_tags
from orchestrator.search.state.events import Reported, Started
from orchestrator.search.state.history import History
from orchestrator.search.state.journal import Journal
from orchestrator.search.state.trials import Outcome, TrialStatus
from orchestrator.tuning.reports import Copied, Costs, Report
from tests.search.test_saved import saved

SPEC = TrialSpec("random", None, 5, 0.1, 0)
OTHER = TrialSpec("sample_vocab", None, 20, 0.12, 0)


def report(trial: str, step: int, best_step: int, accuracy: float, loss: float = 1.0) -> Report:
    metrics = {"accuracy": accuracy, "loss": loss}
    return Report(
        trial, step, metrics, 1.0, best_step, metrics, accuracy, f"{trial}@{step}".encode()
    )


def order(outcome: Outcome) -> list[str]:
    return [record.id for record in outcome.ranking(SearchSpec())]


def test_trials_that_nobody_knew_of_get_a_record_when_they_start() -> None:
    """Proposed trials get their records after the known ones, in the order in which they start."""
    outcome = Outcome([("t000", SPEC)])
    outcome.trial_started("t001", OTHER)
    outcome.trial_started("t000", SPEC)
    assert list(outcome.records) == ["t000", "t001"]
    assert {record.status for record in outcome.records.values()} == {"running"}
    assert outcome.records["t001"].spec == OTHER


def test_trials_are_in_the_order_of_their_numbers() -> None:
    """Trials may start in any order, and the thousandth has a longer id than the others."""
    outcome = Outcome()
    for trial in ("t1000", "t002", "t999", "t001"):
        outcome.trial_started(trial, SPEC)
    assert list(outcome.records) == ["t001", "t002", "t999", "t1000"]


def test_a_trial_that_never_started_has_no_record() -> None:
    """The end of a search also ends trials that were proposed and never started."""
    outcome = Outcome()
    outcome.trial_ended("t000", TrialStatus.STOPPED, "search.stop.minutes were over")
    assert outcome.records == {}


def test_a_trial_that_begins_again_has_one_curve() -> None:
    """Reports of steps that were reported before replace the earlier ones and what followed."""
    outcome = Outcome([("a", SPEC)])
    for step, accuracy in ((4, 0.1), (8, 0.2), (4, 0.3)):
        outcome.trial_reported("a", report("a", step, step, accuracy))
    assert outcome.records["a"].curve("accuracy") == [(4, 0.3)]


def test_a_report_has_what_came_before_an_interruption(tmp_path: Path) -> None:
    """A trial that a resumed search starts again keeps its evaluations, costs and copies."""
    folder = saved(tmp_path, small_job(tmp_path))
    costs = Costs(seconds=2.0)
    copied = replace(report("a", 8, 8, 0.7), copied=Copied("b", 4, OTHER), costs=costs)
    events = [
        Started("a", SPEC),
        Reported(replace(report("a", 4, 4, 0.5), costs=costs)),
        Reported(copied),
        Started("a", SPEC),
        Reported(replace(report("a", 12, 12, 0.8), costs=costs)),
    ]
    Journal(folder, History()).append(events, 1.0)
    (trial,) = read_facts(folder).trials
    assert trial.curve("accuracy") == [(4, 0.5), (8, 0.7), (12, 0.8)]
    assert (trial.spec, trial.costs.seconds, trial.status) == (OTHER, 6.0, "running")


def test_where_a_worker_was_is_known_when_it_is_gone() -> None:
    """A worker's place is the one in its last report with a place."""
    outcome = Outcome([("a", SPEC)])
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
    outcome = Outcome([(name, SPEC) for name in ("a", "b", "c", "d")])
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
    outcome = Outcome([("a", SPEC), ("b", SPEC)])
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
    outcome = Outcome([("a", SPEC), ("b", OTHER)])
    outcome.trial_reported("b", report("b", 4, 4, 0.7))
    outcome.trial_reported("a", replace(report("a", 8, 4, 0.7), copied=Copied("b", 4, OTHER)))
    assert order(outcome) == ["b"]
    outcome.trial_ended("b", TrialStatus.FAILED, "diverged at step 8")
    assert order(outcome) == ["a"]
    outcome.trial_ended("b", TrialStatus.FINISHED, "")
    outcome.trial_reported("a", report("a", 12, 12, 0.8))
    assert order(outcome) == ["a", "b"]


def test_the_spread_over_seeds_is_of_equal_trials() -> None:
    """Only trials that differ in the seed alone and trained as many steps are compared.

    The result is empty when there is no such trial.
    """
    seeds = {f"s{seed}": replace(SPEC, seed=seed) for seed in range(4)}
    outcome = Outcome([*seeds.items(), ("other", OTHER)])
    for name, accuracy, step in (
        ("s0", 0.5, 8),
        ("s1", 0.7, 8),
        ("s2", 0.6, 8),
        ("s3", 0.1, 4),
        ("other", 0.9, 8),
    ):
        outcome.trial_reported(name, report(name, step, step, accuracy))
    found = outcome.over_seeds(outcome.records["s1"])
    assert found["trials"] == 3 and found["seeds"] == [0, 1, 2]
    assert found["validation"]["accuracy"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
    }
    assert outcome.over_seeds(outcome.records["other"]) == {}


@pytest.mark.parametrize("confirms", ["", "t9"])
def test_the_spread_over_seeds_is_kept_with_a_version(confirms: str) -> None:
    """The tag that a registered version gets is read back as the spread; one seed gives none."""
    specs = {f"s{seed}": replace(SPEC, seed=seed, confirms=confirms) for seed in (3, 7)}
    outcome = Outcome([*specs.items(), ("other", OTHER)])
    for name, accuracy in (("s3", 0.5), ("s7", 0.7), ("other", 0.9)):
        outcome.trial_reported(name, report(name, 8, 8, accuracy))
    tags = as_texts(seed_tags(outcome, outcome.records["s7"]), 1000)
    spread = version_tagged(tags).seeds
    assert spread is not None and spread.seeds == (3, 7) and spread.fresh == bool(confirms)
    assert spread.mean["accuracy"] == pytest.approx(0.6)
    assert spread.std["accuracy"] == pytest.approx(0.1 * 2**0.5)
    assert seed_tags(outcome, outcome.records["other"]) == {}
    for broken in ("", "[]", "{}", '{"seeds": [1], "validation": {"accuracy": 1}, "fresh": true}'):
        assert version_tagged({SEEDS_TAG: broken}).seeds is None


def version_tagged(tags: dict[str, str]) -> VersionSummary:
    return VersionSummary("m", 1, (), datetime.now(UTC), "READY", None, "", tags, {}, {}, {})
