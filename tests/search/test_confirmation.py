"""Confirming the best configurations: seeds, choice, ranking, journal and forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_jobs import small_job

from orchestrator.errors import SpecError
from orchestrator.job.space import TrialSpec, confirming_total, fresh_seeds
from orchestrator.job.spec import SearchSpec
from orchestrator.search.prepare import prepare
from orchestrator.search.state.confirmation import (
    confirmed,
    confirmed_text,
    confirming_trials,
    ranking,
    top_configurations,
)
from orchestrator.search.state.events import Ended, Started, from_document, to_document
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import TrialRecord, TrialStatus, ranked
from tests.search.test_plan import MEASURED, PLACEMENT, estimate

SEARCH = SearchSpec(confirm=2, confirm_seeds=2)
SPEC = TrialSpec("random", None, 5, 0.1, 0)
RATES = {"t000": 0.1, "t001": 0.2, "t002": 0.3}
FIRST_RUNS = {"t000": 0.90, "t001": 0.95, "t002": 0.80}


def record(name: str, spec: TrialSpec, accuracy: float | None) -> TrialRecord:
    """Return a finished trial, or a failed one without an accuracy."""
    status = TrialStatus.FAILED if accuracy is None else TrialStatus.FINISHED
    metrics = {} if accuracy is None else {"accuracy": accuracy, "loss": 1 - accuracy}
    return TrialRecord(name, spec, status, step=8, metrics=metrics)


def searched(**fresh: list[float | None]) -> list[TrialRecord]:
    """Return three trials of a search, and the runs that confirm some of them."""
    records = [
        record(name, replace(SPEC, learning_rate=rate), FIRST_RUNS[name])
        for name, rate in RATES.items()
    ]
    for trial, accuracies in fresh.items():
        spec = replace(SPEC, learning_rate=RATES[trial], confirms=trial)
        for seed, accuracy in enumerate(accuracies, start=50):
            name = f"t{len(records):03d}"
            records.append(record(name, replace(spec, seed=seed), accuracy))
    return records


def test_fresh_seeds_follow_from_the_search_s_seed_and_are_new() -> None:
    """They repeat, differ from each other and with search.seed, and are no seed of the space."""
    search = SearchSpec(confirm=1, confirm_seeds=5)
    seeds = fresh_seeds(search)
    assert len(set(seeds)) == 5 and seeds == fresh_seeds(search)
    assert seeds != fresh_seeds(search.model_copy(update={"seed": 1}))
    space = search.space.model_copy(update={"seed": seeds[:3]})
    others = fresh_seeds(search.model_copy(update={"space": space}))
    assert len(others) == 5 and not set(others) & set(seeds[:3])


def test_trials_that_differ_in_the_seed_are_one_configuration() -> None:
    """The best trial of each configuration is confirmed, not two seeds of the same one."""
    records = [*searched(), record("t009", replace(SPEC, learning_rate=0.2, seed=1), 0.94)]
    assert [trial.id for trial in top_configurations(records, SEARCH)] == ["t001", "t000"]


def test_fresh_runs_are_the_configuration_with_another_seed() -> None:
    """Each configuration is trained under the same fresh seeds, and names what it confirms."""
    top = top_configurations(searched(), SEARCH)
    runs = confirming_trials(top, SEARCH)
    assert [run.seed for run in runs] == fresh_seeds(SEARCH) * 2
    assert [run.confirms for run in runs] == ["t001", "t001", "t000", "t000"]
    assert {run.learning_rate for run in runs[:2]} == {0.2}


def test_the_mean_over_fresh_seeds_decides_and_not_the_first_run() -> None:
    """The trial that was ahead by its first run falls behind; its first run counts for nothing."""
    records = searched(t000=[0.91, 0.89], t001=[0.88, 0.90])
    first, second = confirmed(records, SEARCH)
    assert (first.first.id, second.first.id) == ("t000", "t001")
    document = first.document(SEARCH)
    assert document["mean"]["accuracy"] == pytest.approx(0.90)
    assert document["std"]["accuracy"] == pytest.approx(0.0141421356)
    assert document["seeds"] == [50, 51] and document["failed"] == 0
    text = confirmed_text([it.document(SEARCH) for it in (first, second)], "accuracy")
    assert text == (
        "confirmed: t000 0.900 ± 0.014 over 2 seeds (first run 0.900), before "
        "t001 0.890 ± 0.014 over 2 seeds (first run 0.950)"
    )


def test_the_result_is_the_best_fresh_run_of_the_best_configuration() -> None:
    """Best runs of confirmed configurations come first, then trials that were not confirmed."""
    records = searched(t000=[0.91, 0.89], t001=[0.88, 0.90])
    assert [trial.id for trial in ranking(records, SEARCH)] == ["t003", "t006", "t002"]
    assert [trial.id for trial in ranked(records, SEARCH)] == ["t001", "t000", "t002"]


def test_a_metric_that_falls_is_ranked_downwards() -> None:
    """With loss, the smaller mean and the smaller value are the better ones."""
    search = SEARCH.model_copy(update={"metric": "loss"})
    records = searched(t000=[0.91, 0.89], t001=[0.88, 0.90])
    assert [trial.id for trial in ranking(records, search)] == ["t003", "t006", "t002"]


def test_a_configuration_with_a_failed_run_comes_after_the_others() -> None:
    """A mean over the runs that are left would hide what the configuration risks."""
    records = searched(t001=[0.99, None], t000=[0.5, 0.5])
    first, second = confirmed(records, SEARCH)
    assert (first.first.id, second.first.id, second.failed) == ("t000", "t001", 1)
    text = confirmed_text([second.document(SEARCH)], "accuracy")
    assert "0.990 over 1 seed (first run 0.950; 1 failed, so it comes after" in text


def test_without_any_fresh_result_the_search_s_ranking_stands() -> None:
    """A search whose fresh runs all fail still has its result, and says so."""
    records = searched(t001=[None, None])
    assert [trial.id for trial in ranking(records, SEARCH)] == ["t001", "t000", "t002"]
    (only,) = confirmed(records, SEARCH)
    text = confirmed_text([only.document(SEARCH)], "accuracy")
    assert text == "confirmed: t001 without a result under any fresh seed (first run 0.950)"


def test_the_journal_keeps_what_a_trial_confirms() -> None:
    """A start that confirms another trial is read back equal."""
    started = Started("t003", replace(SPEC, confirms="t001"))
    assert to_document(started)["confirms"] == "t001"
    assert from_document(to_document(started)) == started


def test_the_search_and_its_confirmation_are_resumed_apart() -> None:
    """A part of the history has the events of its own trials only."""
    confirming = [Started("t1", replace(SPEC, confirms="t0")), Ended("t1", TrialStatus.FAILED, "")]
    own = [Started("t0", SPEC), Ended("t0", TrialStatus.FINISHED, "")]
    history = History([*own, *confirming])
    assert history.part(confirming=False).events == own
    assert history.part(confirming=True).events == confirming


def test_a_plan_counts_the_fresh_runs(tmp_path: Path) -> None:
    """Four runs to the last step come on top of the search, on two slots."""
    changes = {"search__trials": 4, "search__confirm": 2, "search__confirm_seeds": 2}
    job = small_job(tmp_path, **changes)
    plan = estimate(prepare(job), PLACEMENT, MEASURED)
    assert plan.confirming == 4 and plan.confirmation is not None
    assert plan.confirmation.steps == 4 * 16 and plan.most_steps == 8 * 16
    assert plan.steps == plan.forecast.steps + 4 * 16
    parts = [seconds for name, seconds in plan.seconds.items() if name != "total"]
    assert "confirmation" in plan.seconds and plan.seconds["total"] == pytest.approx(sum(parts))
    assert plan.document()["confirming_trials"] == 4


def test_no_more_configurations_are_confirmed_than_the_space_has(tmp_path: Path) -> None:
    """Two seeds of a single configuration are one configuration to confirm."""
    space = {"init": "random", "num_virtual_tokens": 2, "learning_rate": 0.1, "seed": [0, 1]}
    changes = {"search__space": space, "search__trials": 2, "search__confirm": 2}
    job = small_job(tmp_path, **changes)
    assert confirming_total(job.search) == 3
    assert confirming_total(job.search.model_copy(update={"searcher": "optuna"})) == 3
    assert confirming_total(job.search.model_copy(update={"confirm": None})) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"search__confirm": 2, "search__scheduler": "pbt"}, "changes its configuration"),
        ({"search__confirm": 9}, "9 is more than the 8 of search.trials"),
        ({"search__confirm": 0}, "search.confirm"),
        ({"search__confirm": 2, "search__confirm_seeds": 1}, "search.confirm_seeds"),
        ({"search__confirm_seeds": 5}, "has no effect without search.confirm"),
    ],
)
def test_a_confirmation_without_meaning_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    """Each refusal names the key."""
    with pytest.raises(SpecError, match=reason):
        small_job(tmp_path, **changes)
