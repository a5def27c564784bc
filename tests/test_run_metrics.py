"""Searches that rank by a function of the user's own, on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import Command, write_job

from orchestrator.registry import Registry
from orchestrator.registry.aliases.gate import BETTER_TAG, METRIC_TAG

FIFO = {"search__scheduler": "fifo", "search__trials": 2}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def test_a_search_by_a_function_with_class_weights_registers_its_best(
    ray_cluster: None, command: Command, home: Path
) -> None:
    """The workers import the function; its value ranks, is logged, and decides the gate."""
    name = "own_metrics:cost"
    weights = {"train__class_weights": "balanced"}
    job = write_job(home, search__metric=name, search__mode="min", **weights, **FIFO)
    said = command("run", job, "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    trials = [trial["metrics"] for trial in document["trials"]]
    best = document["best"]["metrics"]
    assert best["validation"][name] == min(metrics[name] for metrics in trials)
    for split in ("validation", "test"):
        assert best[split][name] == round(16 * (1 - best[split]["accuracy"]))
    assert {"macro_f1", "mcc", "ece"} <= set(best["test"])
    model = document["model"]
    version = Registry().resolve(f"{model['name']}:{model['version']}")
    assert (version.tags[METRIC_TAG], version.tags[BETTER_TAG]) == (name, "min")
    assert version.metrics["test"][name] == best["test"][name]


def test_a_function_that_fails_ends_the_search_with_its_name(
    ray_cluster: None, command: Command, home: Path
) -> None:
    """The search ends at once, and not as a crash of its worker."""
    said = command("run", write_job(home, search__metric="own_metrics:no_number", **FIFO))
    assert said.code == 1
    assert "the metric own_metrics:no_number returned nan" in said.err
    assert "correct own_metrics:no_number" in said.err and "Traceback" not in said.err
