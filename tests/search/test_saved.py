"""Searches saved by an earlier release are read with that release's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_jobs import job_document, small_job

from orchestrator.data.dataset import load_rows
from orchestrator.errors import BadInput, SpecError
from orchestrator.job.spec import DataFiles, JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.search.prepare import prepare
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.saved import SavedSearch, load_saved


def saved(path: Path, job: JobSpec, *, begun: bool = False) -> SearchFolder:
    """Return the folder of a search that has just begun."""
    folder = SearchFolder(path / "search")
    folder.path.mkdir()
    SavedSearch.of(prepare(job, begun=begun), {}, "sqlite:///mlflow.db", "run").save(folder, job)
    return folder


def without_new_keys(folder: SearchFolder, **data: Any) -> None:
    """Turn the folder into that of a release without data.held_out, data.empty and warnings."""
    document = yaml.safe_load(folder.job.read_text())
    del document["data"]["held_out"], document["data"]["empty"]
    document["data"].update(data)
    folder.job.write_text(yaml.safe_dump(document, sort_keys=False))
    description = json.loads(folder.description.read_text())
    del description["warnings"]
    folder.description.write_text(json.dumps(description))


def set_aside_job(path: Path) -> JobSpec:
    """Return a job whose only data file is the training split."""
    train = job_document(path)["data"]["path"]["train"]
    return small_job(path, data__path={"train": train})


def test_a_search_keeps_how_its_rows_were_held_out_and_its_warnings(tmp_path: Path) -> None:
    """The saved job states data.held_out explicitly, so that later defaults do not change it."""
    job = set_aside_job(tmp_path)
    folder = saved(tmp_path, job)
    search, kept = load_saved(folder)
    assert (
        kept.data == job.data
        and yaml.safe_load(folder.job.read_text())["data"]["held_out"] == "stratified"
    )
    assert search.warnings == list(prepare(job).warnings) != []


def test_a_search_of_an_earlier_release_finds_its_rows(tmp_path: Path) -> None:
    """Without the key, rows are drawn as the earlier release did, with the same fingerprint."""
    job = set_aside_job(tmp_path)
    earlier = job.model_copy(update={"data": job.data.model_copy(update={"held_out": "random"})})
    folder = saved(tmp_path, earlier)
    without_new_keys(folder)
    search, kept = load_saved(folder)
    assert kept.data.held_out == "random" and search.warnings == []
    assert (
        load_rows(kept.data).fingerprint
        == search.data_fingerprint
        != load_rows(job.data).fingerprint
    )
    search.check(folder, prepare(kept, begun=True))


def test_a_search_of_an_earlier_release_goes_on_with_what_is_refused_now(tmp_path: Path) -> None:
    """A search of an earlier release goes on despite rows that a new one is refused for.

    These are rows without input, a fraction of a split that is given, and a single label.
    """
    job = small_job(tmp_path)
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(json.dumps({"text": text, "label": 1}) + "\n" for text in ["a b", "c", None, "d"])
    )
    path = DataFiles(train=str(train), validation=str(train))
    earlier = {"held_out": "random", "empty": "keep", "path": path}
    folder = saved(
        tmp_path, job.model_copy(update={"data": job.data.model_copy(update=earlier)}), begun=True
    )
    without_new_keys(folder, validation_fraction=0.3)
    search, kept = load_saved(folder)
    made = prepare(kept, begun=True)
    search.check(folder, made)
    assert made.warnings[0].startswith("all rows have the label '1'")
    with pytest.raises(BadInput, match="all rows have the label"):
        prepare(
            kept.model_copy(
                update={"data": kept.data.model_copy(update={"validation_fraction": 0.1})}
            )
        )


def test_a_search_of_an_earlier_release_may_have_conflicts(tmp_path: Path) -> None:
    """A search that has begun goes on despite conflicts that a new one is refused for.

    A value that is wrong by itself still raises SpecError.
    """
    folder = saved(tmp_path, set_aside_job(tmp_path))
    without_new_keys(folder, template="{label} {text}")
    with pytest.raises(SpecError, match="the input"):
        load_job(folder.job)
    _, kept = load_saved(folder)
    assert kept.data.template == "{label} {text}" and kept.data.held_out == "random"
    document = yaml.safe_load(folder.job.read_text())
    document["data"]["max_input_tokens"] = "many"
    folder.job.write_text(yaml.safe_dump(document))
    with pytest.raises(SpecError, match="max_input_tokens"):
        load_saved(folder)
