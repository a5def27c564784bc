"""A registry with a prompt that has everything that a model card shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from models import load, model_folder
from small_jobs import write_job
from test_exchange import Store, moved_prompt

from orchestrator.artifact import DataRecord, PromptArtifact
from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.registry import SEEDS_TAG, EvaluationRecord, Registry

SPREAD = {
    "trials": 3,
    "seeds": [0, 1, 2],
    "validation": {"accuracy": {"mean": 0.9, "std": 0.0125}},
    "fresh": True,
}
# 12 of 16 rows are right.
OUTCOMES = RowOutcomes({"label": np.array([0, 1] * 8), "given": np.array([0, 1] * 6 + [1, 0] * 2)})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A registry with a prompt that has everything that a card shows, and a prefix."""
    folder = tmp_path_factory.mktemp("cards")
    backbone = load(model_folder())
    registry = Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache" / "own")
    with registry.start_search("made", {}, {}) as search:
        for name in ("prompt", "prefix"):
            artifact = moved_prompt(backbone, name)
            details = {
                "metrics": {"test": {"accuracy": 0.75, "loss": 0.5},
                            "validation": {"accuracy": 0.9, "loss": 0.4}},
                "baselines": {"zero_shot": {"test": {"accuracy": 0.25}}},
                "data": DataRecord(path='{"train": "/x/rows/a.csv", "test": "/x/rows/b.csv"}',
                                   fingerprint="d" * 64, rows={"train": 40, "test": 16},
                                   test_fingerprint="e" * 64),
            }  # fmt: skip
            described = artifact.manifest.model_copy(update=details)
            saved = PromptArtifact(artifact.tensors, described).save(folder / name)
            registry.register(
                saved, name, search.run_id, metric="accuracy", tags={SEEDS_TAG: SPREAD},
                outcomes=OUTCOMES if name == "prompt" else None,
            )  # fmt: skip
    registry.set_alias("prompt", "champion", 1, reason="better on `x` | https://a:b@c.d/?token=abc")
    record = EvaluationRecord("/x/other.csv", "test", "", 20, "a" * 64, {"accuracy": 0.5})
    part = replace(record, group="source=b", fingerprint="b" * 64, metrics={"accuracy": 0.125})
    registry.log_evaluations(registry.resolve("prompt"), [record, part])
    return Store(folder, write_job(folder), backbone, registry)


@pytest.fixture
def store(made: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Point the verbs at the registry."""
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.folder / "cache"))
    return made
