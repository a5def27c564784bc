"""The best of each method of a mixed search, and whether a prompt is the best of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_jobs import job_document, small_job, write_job

from orchestrator.cli.pages.search import run_summary
from orchestrator.job.space import TrialSpec, trials
from orchestrator.job.spec import JobSpec
from orchestrator.search.mixture import (
    better_baseline,
    is_prompt,
    method_documents,
    method_metrics,
    to_test,
)
from orchestrator.search.prepare import prepare
from orchestrator.search.report.comparison import comparison
from orchestrator.search.report.facts import SearchFacts
from orchestrator.search.report.figures import draw
from orchestrator.search.report.page import page
from orchestrator.search.result import BestTrial
from orchestrator.search.state.events import Started, from_document, to_document
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.saved import SavedSearch, load_saved
from orchestrator.search.state.trials import TrialRecord, TrialStatus, ranked
from orchestrator.search.tracking import TAGGED
from orchestrator.tuning.reports import Costs

METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": [2, 5]},
    "prefix_tuning": {"num_virtual_tokens": [2, 5]},
    "lora": {"rank": [2, 4], "learning_rate": 0.01},
    "adapter": {"bottleneck": [4, 8], "learning_rate": 0.01},
}
ACCURACY = {
    "prompt_tuning": [0.7, 0.6], "prefix_tuning": [0.5, 0.4], "lora": [0.9, 0.8],
    "adapter": [None, None],
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return small_job(
        tmp_path, search__space={"method": METHODS}, search__metric="accuracy", search__trials=8
    )


def records(job: JobSpec, accuracy: dict[str, list[Any]] = ACCURACY) -> list[TrialRecord]:
    """Return the finished trials; those without an accuracy failed."""
    left = {method: list(values) for method, values in accuracy.items()}
    found = []
    for number, spec in enumerate(trials(job.search)):
        value = left[spec.method].pop(0)
        status = TrialStatus.FAILED if value is None else TrialStatus.FINISHED
        metrics = {} if value is None else {"accuracy": value, "loss": 1 - value}
        costs = Costs(parameters=1000 + number, stored_bytes=4000 + number, seconds=1.5)
        points = [(4, metrics)] if metrics else []
        record = TrialRecord(
            f"t{number:03d}", spec, status, step=4, metrics=metrics, costs=costs, points=points
        )
        found.append(record)
    return found


def with_tests(found: list[TrialRecord]) -> list[BestTrial]:
    return [BestTrial(trial, {"accuracy": 0.1, "loss": 2.0}) for trial in found]


def methods_of(found: list[TrialRecord]) -> list[str]:
    return [trial.spec.method for trial in found]


def test_the_best_of_each_method_and_the_prompts_to_register_are_tested(job: JobSpec) -> None:
    """With register_top 2 these are LoRA's best trial, two prompts, and the best prefix."""
    found = ranked(records(job), job.search)
    assert methods_of(to_test(found, job)) == ["lora", "prompt_tuning", "prefix_tuning"]
    top = job.model_copy(update={"registry": job.registry.model_copy(update={"register_top": 2})})
    assert methods_of(to_test(found, top)) == [
        "lora", "prompt_tuning", "prompt_tuning", "prefix_tuning",
    ]  # fmt: skip
    prompts = [trial.id for trial in to_test(found, top) if is_prompt(trial, top)]
    assert prompts[:2] == [trial.id for trial in found if is_prompt(trial, top)][:2]


def test_a_search_of_one_method_tests_what_it_registers(job: JobSpec) -> None:
    alone = job.of("prompt_tuning")
    found = ranked(records(job), job.search)
    assert to_test(found, alone) == found[:1]


def test_each_method_is_described_with_its_costs(job: JobSpec) -> None:
    """Methods come in the order of their best trials; one without a result is named last."""
    found = records(job)
    documents = method_documents(with_tests(to_test(ranked(found, job.search), job)), found, job)
    assert [it["method"] for it in documents] == [
        "lora", "prompt_tuning", "prefix_tuning", "adapter",
    ]  # fmt: skip
    assert [it["registrable"] for it in documents] == [False, True, True, False]
    assert [it["trials"] for it in documents] == [2, 2, 2, 2]
    best, last = documents[0], documents[-1]
    assert best["metrics"] == {
        "validation": {"accuracy": 0.9, "loss": pytest.approx(0.1)},
        "test": {"accuracy": 0.1, "loss": 2.0},
    }
    assert best["costs"]["parameters"] > 1000 and best["config"]["method"] == "lora"
    assert (last["trial"], last["config"], last["metrics"], last["costs"]) == (None, None, {}, None)
    figures = method_metrics(documents)
    assert figures["best_lora_validation_accuracy"] == 0.9
    assert figures["best_prefix_tuning_cost_stored_bytes"] > 4000
    assert not any("adapter" in name for name in figures)


@pytest.mark.parametrize(
    ("prompt", "lora", "better"), [(0.7, 0.9, True), (0.9, 0.7, False), (0.9, 0.9, False)]
)
def test_only_a_better_metric_of_a_baseline_beats_the_prompts(
    job: JobSpec, prompt: float, lora: float, better: bool
) -> None:
    """At the same accuracy a prompt wins, though LoRA's loss puts it first."""
    found = records(job, ACCURACY | {"prompt_tuning": [prompt, 0.1], "lora": [lora, 0.1]})
    if prompt == lora:
        found = [
            replace(it, metrics={**it.metrics, "loss": 0.0}) if it.spec.method == "lora" else it
            for it in found
        ]
    order = ranked(found, job.search)
    best_prompt = next(trial for trial in order if is_prompt(trial, job))
    said = better_baseline(order[0], best_prompt, job)
    assert bool(said) == better
    if better:
        assert "0.900 against 0.700" in said and "lora can be neither registered" in said


def test_a_trial_of_a_mixed_search_survives_the_journal(job: JobSpec) -> None:
    """The started event has the method, which MLflow's runs have as a tag."""
    for spec in trials(job.search):
        event = Started("t000", spec, 1)
        assert from_document(to_document(event)) == event
    assert "method" in TAGGED


def test_a_mixed_search_is_saved_and_read_back(tmp_path: Path, job: JobSpec) -> None:
    """Another process has the same job and the same trials, so that it can resume the search."""
    folder = SearchFolder(tmp_path / "search")
    folder.path.mkdir()
    prepared = prepare(job)
    SavedSearch.of(prepared, {}, "sqlite:///mlflow.db", "run").save(folder, job)
    saved, again = load_saved(folder)
    assert again == job and trials(again.search) == prepared.trials
    saved.check(folder, prepare(again))


def facts(job: JobSpec, result: dict[str, Any] | None) -> SearchFacts:
    return SearchFacts("s", job, "run", records(job), {}, result)


def result_of(job: JobSpec) -> dict[str, Any]:
    """Return the document of a search that LoRA has won."""
    found = records(job)
    best = to_test(ranked(found, job.search), job)
    documents = method_documents(with_tests(best), found, job)
    metrics = {"validation": best[0].metrics, "test": {"accuracy": 0.1, "loss": 2.0}}
    return {
        "search": "s", "trials": [it.document() for it in found],
        "best": {"trial": best[0].id, "config": best[0].spec.config(), "metrics": metrics},
        "methods": documents, "baselines": {}, "artifact": "kept",
        "model": {
            "name": "tiny", "version": 1, "trial": best[1].id, "alias": "challenger",
            "reason": "Version 1 is challenger, not champion.",
        },
        "seconds": {"training": 1.0, "total": 2.0},
    }  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
def test_the_report_shows_the_best_of_each_method(job: JobSpec, finished: bool) -> None:
    """Trials have a column of methods; a search that still runs has the table too."""
    shown = facts(job, result_of(job) if finished else None)
    text = page(shown, {})
    assert "<h2>Best of each method, by validation accuracy</h2>" in text
    section = text.split("<h2>Best of each method")[1].split("<h2>")[0]
    rows = section.split("<tr")[2:]
    assert [row.split("<td>")[1].split("<")[0] for row in rows] == [
        "lora", "prompt_tuning", "prefix_tuning",
    ]  # fmt: skip
    assert "<th>method</th>" in text.split("<h2>Trials</h2>")[1]
    assert "prompt_tuning, prefix_tuning, lora, adapter of" in text
    assert ("method_bytes" in draw(shown)) and "method_bytes" not in draw(
        SearchFacts("s", job.of("lora"), "run", [], {}, None)
    )


def test_a_mixed_search_beside_others_has_its_winners_method(job: JobSpec) -> None:
    (entry,) = comparison([facts(job, result_of(job))])["searches"]
    assert entry["method"] == "lora"


def test_the_summary_says_that_the_winner_is_not_registered(job: JobSpec) -> None:
    """It lists the methods with their costs, where LoRA's result is, and what was registered."""
    lines = run_summary(result_of(job), job)
    text = "\n".join(lines)
    methods = lines[next(n for n, line in enumerate(lines) if line.startswith("method ")) :]
    assert [line.split()[0] for line in methods if line.startswith(tuple(METHODS))] == [
        "lora", "prompt_tuning", "prefix_tuning", "adapter",
    ]  # fmt: skip
    assert any(line.startswith("lora ") and "0.900" in line for line in methods)
    assert "kept in kept" in text and "neither registered nor served" in text
    assert "Version 1 is challenger, not champion." in text
    assert "registered tiny version 1, alias challenger" in text
    assert "orchestrator promote tiny 1" in lines[-1]


def test_prompts_that_start_from_a_folder_are_checked_for_each_method(tmp_path: Path) -> None:
    """The problem of a missing folder is at the key of the method that names it."""
    from orchestrator.search.inputs import examine

    space = {
        "method": {
            "prompt_tuning": {"init": {"artifact": "./missing"}},
            "lora": {"learning_rate": 0.01},
        }
    }
    found = examine(small_job(tmp_path, search__space=space)).faults
    assert [fault.key for fault in found] == ["search.space.method.prompt_tuning.init.artifact"]


def test_a_package_moves_the_folders_of_each_method(tmp_path: Path) -> None:
    """Both a shared start and one of a single method are packed under their own keys."""
    from orchestrator.cluster.submit.package import moved

    space = {
        "init": ["random", {"artifact": "./shared"}],
        "method": {
            "prompt_tuning": {"init": {"artifact": "./own"}},
            "prefix_tuning": {},
            "lora": {"learning_rate": 0.01},
        },
    }
    job = small_job(tmp_path, search__space=space)
    keys = []

    def change(key: str, text: str) -> str:
        keys.append(key)
        return f"/there/{text}" if "init" in key else text

    parts = moved(job, change).search.space.parts
    assert [key for key in keys if "init" in key] == [
        "search.space.method.prompt_tuning.init.0", "search.space.init.1",
    ]  # fmt: skip
    assert parts["prompt_tuning"].init.artifact == "/there/./own"  # type: ignore[union-attr]
    assert parts["prefix_tuning"].init[1].artifact == "/there/./shared"  # type: ignore[index,union-attr]
    assert "init" not in parts["lora"].given


def test_the_document_of_a_job_names_no_method_twice(tmp_path: Path) -> None:
    """A mixed job that is written out has no method of its own beside the methods."""
    file = write_job(tmp_path, search__space={"method": METHODS})
    written = yaml.safe_load(file.read_text())
    dumped = JobSpec.model_validate(written).model_dump(exclude_none=True)
    assert "method" not in dumped and list(dumped["search"]["space"]) == ["method"]
    assert job_document(tmp_path)["name"] == dumped["name"]


def test_a_label_begins_with_the_method(job: JobSpec) -> None:
    (spec,) = [spec for spec in trials(job.search) if spec.rank == 2]
    assert spec.label() == "lora: rank 2, alpha 16, lr 0.01, seed 0"
    assert TrialSpec("random", None, 5, 0.1, 0).label().startswith("random, 5 tokens")
