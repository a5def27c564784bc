"""A small search of each baseline: kept results, costs, and comparison with a prompt's search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from small_jobs import Command, Finished, Recorder, close, run_search, write_job

from orchestrator.search.report import read_facts
from orchestrator.search.resume import resume_search
from orchestrator.search.state.folder import SearchFolder

METHODS = [
    "lora",
    "prompt_design",
    pytest.param("adapter", marks=pytest.mark.long),
    pytest.param("model_tuning", marks=pytest.mark.long),
    pytest.param("lomo", marks=pytest.mark.long),
]
RATES: list[float] = [0.001, 0.01]
TRAINED: dict[str, Any] = {"search__trials": 2, "train__steps": 8}
JOBS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lora": (
        {"search__space": {"rank": [2, 4], "learning_rate": RATES}, **TRAINED},
        {"adapter_config.json", "adapter_model.safetensors"},
    ),
    "adapter": (
        {"search__space": {"bottleneck": 4, "learning_rate": RATES}, **TRAINED},
        {"adapter.safetensors"},
    ),
    "model_tuning": (
        {"search__space": {"learning_rate": RATES}, "search__searcher": "optuna", **TRAINED},
        {"config.json", "model.safetensors", "tokenizer.json"},
    ),
    "lomo": (
        {"search__space": {"learning_rate": RATES}, "train__optimizer": "sgd", **TRAINED},
        {"config.json", "model.safetensors", "tokenizer.json"},
    ),
    "prompt_design": (
        {
            "search__space": {"shots": [0, 1], "template": ["{text}\nspam?", "{text} spam:"]},
            "train": {},
        },
        set(),
    ),
}


def search_of(method: str, folder: Path) -> Finished:
    changes, _ = JOBS[method]
    changes = {"search__metric": "accuracy", **changes}
    return run_search(write_job(folder, name=method.replace("_", "-"), method=method, **changes))


class Searches:
    """Searches of each method in one folder, run when a test first needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Finished] = {}

    def __getitem__(self, method: str) -> Finished:
        if method not in self._found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                self._found[method] = search_of(method, self.folder)
        return self._found[method]


@pytest.fixture(scope="module")
def searches(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Searches:
    return Searches(tmp_path_factory.mktemp("baselines"))


def folder_of(search: Finished) -> SearchFolder:
    return SearchFolder(search.folder / ".orchestrator" / "searches" / search.document["search"])


@pytest.mark.parametrize("method", METHODS)
def test_a_baselines_result_is_kept_and_not_registered(searches: Searches, method: str) -> None:
    """Loadable files are in the search's folder and the trial's run; no model is registered."""
    search, document = searches[method], searches[method].document
    assert document["status"] == "succeeded" and document["model"] is None
    assert {trial["status"] for trial in document["trials"]} <= {"finished", "stopped"}
    assert set(document["baselines"]) == {"zero_shot", "few_shot"} and not search.left_behind
    kept = Path(document["artifact"])
    assert {file.name for file in kept.iterdir()} >= {"baseline.json", *JOBS[method][1]}
    about = json.loads((kept / "baseline.json").read_text())
    assert about["method"] == method and about["metrics"] == document["best"]["metrics"]
    client = mlflow.MlflowClient(search.tracking_uri)
    assert not client.search_registered_models()
    (experiment,) = [one for one in client.search_experiments() if one.name == search.job.name]
    runs = client.search_runs([experiment.experiment_id])
    best = next(
        run for run in runs if run.data.tags.get("orchestrator.trial") == document["best"]["trial"]
    )
    assert {file.path for file in client.list_artifacts(best.info.run_id, "baseline")} >= {
        "baseline/baseline.json"
    }
    costs = document["costs"]
    assert {name: best.data.metrics[f"cost_{name}"] for name in costs} == pytest.approx(costs)
    trained = method != "prompt_design"
    assert (costs["parameters"] > 0) == (costs["seconds"] > 0) == trained and costs[
        "stored_bytes"
    ] > 0


@pytest.mark.long
def test_a_resumed_search_finds_the_same(
    searches: Searches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search cut off before its result was written evaluates and keeps the same trial."""
    search = searches["lora"]
    monkeypatch.chdir(search.folder)
    folder = folder_of(search)
    result = json.loads(folder.result.read_bytes())
    folder.result.unlink()
    document, job = resume_search(folder.id, Recorder)
    assert job == search.job and close(document["best"]["metrics"], result["best"]["metrics"])
    assert document["trials"] == result["trials"] and Path(document["artifact"]).is_dir()


def test_searches_are_compared(
    searches: Searches, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each search has a line with accuracy, parameters, bytes, seconds and memory.

    The page and the document have the same figures.
    """
    compared = {method: searches[method] for method in ("lora", "prompt_design")}
    monkeypatch.chdir(searches.folder)
    ids = [search.document["search"] for search in compared.values()]
    said = command("report", *ids, "--out", tmp_path / "methods.html", "--json")
    assert said.code == 0 and not said.document["warnings"]
    assert set(said.document["baselines"]) == {"zero_shot", "few_shot"}
    for entry, search in zip(said.document["searches"], compared.values(), strict=True):
        assert entry["metrics"] == search.document["best"]["metrics"]
        assert entry["costs"] == pytest.approx(search.document["costs"])
    page = (tmp_path / "methods.html").read_text()
    lines = command("report", *ids).out.splitlines()
    assert len(lines) == 1 + 2 + len(ids) and lines[1].startswith("without a prompt")
    for method in compared:
        assert any(line.startswith(method.replace("_", " ")) for line in lines[3:])
        assert f"<td>{method.replace('_', ' ')}</td>" in page
    assert command("report", ids[0], "nosuch").code == 2


def test_searches_on_other_data_are_not_comparable(
    searches: Searches, finished: Finished, command: Command
) -> None:
    """Differences are named; the baselines are left out, because each search has its own."""
    folders = [folder_of(search).path for search in (searches["lora"], finished)]
    said = command("report", *folders, "--json")
    assert said.document["baselines"] == {}
    assert [warning.partition(":")[0] for warning in said.document["warnings"]] == [
        "not the same metric"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_has_a_report(searches: Searches, method: str) -> None:
    """The page was written, logged with the run, and lists every trial with its costs."""
    folder = folder_of(searches[method])
    facts, text = read_facts(folder), folder.report.read_text()
    assert all(f"<td>{trial.id}</td>" in text for trial in facts.trials)
    assert "<th>trained parameters</th>" in text and searches[method].job.result_name() in text
    logged = mlflow.MlflowClient(searches[method].tracking_uri).list_artifacts(facts.run_id)
    assert "report.html" in {file.path for file in logged}
