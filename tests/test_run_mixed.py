"""A whole search of several methods: result, registration, MLflow runs, report, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from small_jobs import Finished, Recorder, close, run_search, write_job

from orchestrator.registry import Registry
from orchestrator.search.report import read_facts
from orchestrator.search.resume import resume_search
from orchestrator.search.state.folder import SearchFolder

TINY, GOOD = 1e-9, {"prompt_tuning": 0.3, "prefix_tuning": 0.03, "lora": 0.03}
"""A learning rate that learns nothing, and one of each method that does."""


def space(*better: str) -> dict[str, Any]:
    """Return a space in which only the methods in ``better`` learn."""
    rates = {method: rate if method in better else TINY for method, rate in GOOD.items()}
    init = {"init": "random", "num_virtual_tokens": [2, 4]}
    return {
        "seed": 1,
        "method": {
            "prompt_tuning": {**init, "learning_rate": rates["prompt_tuning"]},
            "prefix_tuning": {**init, "learning_rate": rates["prefix_tuning"]},
            "lora": {"rank": [2, 4], "learning_rate": rates["lora"]},
        },
    }


def search_in(folder: Path, *better: str, **changes: Any) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        file = write_job(
            folder, name="mixed", search__space=space(*better), search__trials=6,
            search__scheduler="fifo", train__steps=8, **changes,
        )  # fmt: skip
        return run_search(file)


@pytest.fixture(scope="module")
def lora_wins(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return search_in(tmp_path_factory.mktemp("lora-wins"), "lora")


def folder_of(search: Finished) -> SearchFolder:
    return SearchFolder(search.folder / ".orchestrator" / "searches" / search.document["search"])


def test_a_winner_that_cannot_be_registered_is_kept_and_told(lora_wins: Finished) -> None:
    """LoRA's result is in the search's folder; the best prompt is a challenger, no champion."""
    document, kept = lora_wins.document, Path(lora_wins.document["artifact"])
    assert document["best"]["config"]["method"] == "lora" and not lora_wins.left_behind
    about = json.loads((kept / "baseline.json").read_text())
    assert about["method"] == "lora" and about["metrics"] == document["best"]["metrics"]
    assert (kept / "adapter_model.safetensors").is_file()
    model = document["model"]
    assert model["alias"] == "challenger" and "orchestrator promote mixed 1" in model["reason"]
    assert "lora can be neither registered nor served" in model["reason"]
    assert model["reason"] in lora_wins.said
    registry = Registry(lora_wins.tracking_uri)
    (version,) = registry.versions("mixed")
    assert version.aliases == ("challenger",) or list(version.aliases) == ["challenger"]
    trial = next(it for it in document["trials"] if it["id"] == model["trial"])
    assert trial["config"]["method"] in ("prompt_tuning", "prefix_tuning")


def test_the_document_has_the_best_of_each_method(lora_wins: Finished) -> None:
    """Six trials of three methods; each method's best is tested and has its costs."""
    document = lora_wins.document
    methods = document["methods"]
    assert methods[0]["method"] == "lora" and methods[0]["trial"] == document["best"]["trial"]
    assert {it["method"] for it in methods} == set(GOOD)
    assert [it["trials"] for it in methods] == [2, 2, 2]
    for found in methods:
        assert set(found["metrics"]) == {"validation", "test"}
        assert found["costs"]["parameters"] > 0 < found["costs"]["peak_bytes"]
    assert [it["config"]["method"] for it in document["trials"]] == 2 * list(GOOD)


def test_each_run_in_mlflow_has_its_method(lora_wins: Finished) -> None:
    """People filter runs by the tag; the search's own run has the best of each with its costs."""
    client = mlflow.MlflowClient(lora_wins.tracking_uri)
    (experiment,) = [it for it in client.search_experiments() if it.name == "mixed"]
    runs = client.search_runs([experiment.experiment_id])
    methods = {
        run.data.tags["orchestrator.trial"]: run.data.tags["method"]
        for run in runs
        if "orchestrator.trial" in run.data.tags
    }
    assert methods == {it["id"]: it["config"]["method"] for it in lora_wins.document["trials"]}
    parent = client.get_run(lora_wins.document["mlflow"]["run_id"])
    assert parent.data.params["method"] == ", ".join(GOOD)
    for found in lora_wins.document["methods"]:
        name = f"best_{found['method']}_cost_parameters"
        assert parent.data.metrics[name] == found["costs"]["parameters"]


def test_the_report_and_the_progress_show_the_methods(lora_wins: Finished) -> None:
    facts = read_facts(folder_of(lora_wins))
    text = folder_of(lora_wins).report.read_text()
    assert list(facts.best_of_each) == [it["method"] for it in lora_wins.document["methods"]]
    assert "Best of each method" in text and "Metric against stored bytes, by method" in text
    assert "[lora: rank 2" in lora_wins.said and "[prefix tuning: random" in lora_wins.said


@pytest.mark.parametrize("method", GOOD)
def test_trials_equal_those_of_a_search_of_one_method(
    lora_wins: Finished, tmp_path: Path, method: str
) -> None:
    """A search of the method alone has the same trials with the same metrics.

    Digit by digit for LoRA, which trains alone; prompts up to the rounding of other packs, since a
    trial that Tune starts late misses a round of its neighbours.
    """
    shared = {"seed": 1, **space("lora")["method"][method]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        file = write_job(
            tmp_path, method=method, search__space=shared, search__trials=2,
            search__scheduler="fifo", train__steps=8,
        )  # fmt: skip
        alone = run_search(file)
    mixed = [it for it in lora_wins.document["trials"] if it["config"]["method"] == method]
    for one, other in zip(mixed, alone.document["trials"], strict=True):
        assert one["config"] == {"method": method, **other["config"]}
        assert one["steps"] == other["steps"]
        assert close(one["metrics"], other["metrics"])
        assert one["metrics"] == other["metrics"] or method != "lora"


def test_a_resumed_search_of_several_methods_finds_the_same(
    lora_wins: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search cut off before its result was written keeps and registers the same trials."""
    monkeypatch.chdir(lora_wins.folder)
    folder = folder_of(lora_wins)
    result = json.loads(folder.result.read_bytes())
    folder.result.unlink()
    document, job = resume_search(folder.id, Recorder)
    assert job == lora_wins.job and document["trials"] == result["trials"]
    assert close(document["best"]["metrics"], result["best"]["metrics"])
    assert document["model"] == result["model"]


def test_a_prompt_that_wins_becomes_champion(ray_cluster: None, tmp_path: Path) -> None:
    """With TPE and ASHA too; nothing is kept as a baseline's result."""
    found = search_in(tmp_path, "prompt_tuning", "prefix_tuning", search__searcher="optuna")
    document = found.document
    assert document["best"]["config"]["method"] in ("prompt_tuning", "prefix_tuning")
    assert document["model"]["alias"] == "champion" and "artifact" not in document
    assert document["model"]["trial"] == document["best"]["trial"]
