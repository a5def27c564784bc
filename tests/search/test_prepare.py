"""A job's inputs, before anything is spent on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import small_job

import orchestrator.quickstart
from orchestrator.quickstart import Recipe
from orchestrator.search.prepare import prepare

TINY = Recipe(documents=64, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16)


def test_making_the_quickstart_model_is_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds where it is made, none where it lies in the cache already or the job has another model."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(orchestrator.quickstart, "Recipe", lambda: TINY)
    job = small_job(tmp_path, base_model__id="builtin:quickstart")
    making_s = prepare(job).making_s
    assert making_s > 0.01
    assert prepare(job).making_s < making_s / 2
    assert prepare(small_job(tmp_path)).making_s < making_s / 2
