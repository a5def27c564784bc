"""A job per method and family, up to a version that answers as the search measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import load, save_family
from small_jobs import run_search, write_job

from orchestrator.artifact import PromptArtifact
from orchestrator.registry import Registry
from orchestrator.search.prepare import prepare
from orchestrator.serving.offline import OfflineModel

SMALL: dict[str, Any] = {
    "search__space__init": ["random", "class_labels"],
    "search__space__num_virtual_tokens": 3,
    "search__space__seed": 0,
    "search__trials": 2,
    "train__steps": 8,
    "train__schedule": "linear",
    "train__clip_norm": 1.0,
    "train__micro_batch_size": 3,
}
JOBS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "prefix tuning of a causal model": ("llama", {"method": "prefix_tuning"}, {"prefix.decoder"}),
    "prefix tuning of an encoder-decoder": (
        "t5",
        {"method": "prefix_tuning", "reparameterization": {"type": "none"}},
        {"prefix.decoder", "prefix.encoder", "prefix.cross"},
    ),
    "P-tuning of a masked model": (
        "bert",
        {"method": "p_tuning", "data__template": "{*}a {text} is{*}{_}."},
        {"prompt"},
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_becomes_a_version_that_answers_as_measured(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The registered artifact reaches the document's test accuracy on the test rows."""
    family, changes, tensors = JOBS[name]
    monkeypatch.chdir(tmp_path)
    model = save_family(tmp_path / "model", family)
    finished = run_search(write_job(tmp_path, base_model__id=str(model), **SMALL, **changes))
    assert {document["status"] for document in finished.document["trials"]} <= {
        "finished",
        "stopped",
    }
    folder = Registry(finished.tracking_uri, cache_dir=tmp_path / "cache").fetch("tiny", 1)
    artifact = PromptArtifact.load(folder)
    assert set(artifact.tensors) == tensors and artifact.manifest.method == finished.job.method
    rows = prepare(finished.job).rows.test
    answers = OfflineModel.from_artifact(folder, load(model)).classify(
        [{"text": row["text"]} for row in rows]
    )
    right = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == finished.document["best"]["metrics"]["test"]["accuracy"]


def test_a_search_starts_from_another_searchs_prompt(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``init: {artifact: tiny@champion}`` makes a trial start from the registered prompt."""
    monkeypatch.chdir(tmp_path)
    model = save_family(tmp_path / "model", "llama")
    small = {**SMALL, "base_model__id": str(model), "search__trials": 1}
    first = run_search(write_job(tmp_path, **small))
    init = {"artifact": "tiny@champion"}
    gently = {
        "search__space__init": init,
        "search__space__learning_rate": 1e-6,
        "train__evaluate_every": 1,
    }
    again = run_search(write_job(tmp_path, **{**small, **gently, "train__steps": 2}))
    (trial,) = again.document["trials"]
    assert trial["config"]["init"] == init and trial["status"] == "finished"
    start = again.reports[trial["id"]][0]
    assert start.metrics["loss"] == pytest.approx(
        first.document["best"]["metrics"]["validation"]["loss"], rel=1e-4
    )
