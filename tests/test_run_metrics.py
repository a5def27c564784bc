"""Searches that rank by a function of the user's own, in a Ray whose workers can import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_jobs import write_job

from orchestrator.registry import Registry
from orchestrator.registry.aliases.gate import BETTER_TAG, METRIC_TAG

TESTS = str(Path(__file__).parent)
LIMIT_S = 240
pytestmark = pytest.mark.ray  # its own


def run(folder: Path, metric: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run a search of two trials, with the folder of the tests on PYTHONPATH."""
    short = {"search__scheduler": "fifo", "search__trials": 2, **changes}
    job = write_job(folder, search__metric=metric, **short)
    path = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH", "")]))
    tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", str(job), "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": tracking_uri},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_search_by_a_function_with_class_weights_registers_its_best(tmp_path: Path) -> None:
    """The workers import the function; its value ranks, is logged, and decides the gate."""
    name, weights = "own_metrics:cost", {"train__class_weights": "balanced"}
    ran = run(tmp_path, name, search__mode="min", **weights)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    best = document["best"]["metrics"]
    trials = [trial["metrics"][name] for trial in document["trials"]]
    assert best["validation"][name] == min(trials)
    for split in ("validation", "test"):
        assert best[split][name] == round(16 * (1 - best[split]["accuracy"]))
    assert {"macro_f1", "mcc", "ece"} <= set(best["test"])
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}")
    version = registry.resolve(f"{document['model']['name']}:{document['model']['version']}")
    assert (version.tags[METRIC_TAG], version.tags[BETTER_TAG]) == (name, "min")
    assert version.metrics["test"][name] == best["test"][name]


def test_a_function_that_fails_ends_the_search_with_its_name(tmp_path: Path) -> None:
    """The search ends at once, and not as a crash of its worker."""
    ran = run(tmp_path, "own_metrics:no_number")
    assert ran.returncode == 1
    assert "the metric own_metrics:no_number returned nan" in ran.stderr
    assert "correct own_metrics:no_number" in ran.stderr and "Traceback" not in ran.stderr
