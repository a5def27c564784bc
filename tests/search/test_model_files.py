"""A node without the base model's folder gets a copy, once: the real object store, two askers at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from models import model_folder

from orchestrator.base_model import resolve_model
from orchestrator.errors import JobFailed
from orchestrator.search import model_files
from orchestrator.search.model_files import ModelFiles, fetched, model_source, start_files
from orchestrator.spec import BaseModelSpec


@pytest.fixture
def files(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    actor = ray.remote(num_cpus=0)(ModelFiles).remote(model_folder(), chunk=1000)
    yield actor
    ray.kill(actor)


def test_a_copy_is_the_folder(files: Any, tmp_path: Path) -> None:
    """Every file byte for byte, in pieces; the source keeps the id of the spec, and its own copy serves the next."""
    spec = BaseModelSpec(id="/nowhere/model")
    source = model_source(spec, files)
    original = resolve_model(BaseModelSpec(id=str(model_folder())))
    assert source.id == "/nowhere/model" and source.path.is_relative_to(tmp_path / "cache")
    for file in original.path.iterdir():
        assert (source.path / file.name).read_bytes() == file.read_bytes()
    stamp = source.path.stat().st_mtime_ns
    assert model_source(spec, files).path == source.path and source.path.stat().st_mtime_ns == stamp
    assert model_source(BaseModelSpec(id=str(model_folder())), files).path == original.path


def test_those_who_ask_at_a_time_share_a_copy(files: Any, tmp_path: Path) -> None:
    """Workers of one node: one folder, and nothing half-made beside it."""
    cache = {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")}
    ask = ray.remote(num_cpus=0.1, runtime_env={"env_vars": cache})(lambda actor: str(fetched(actor)))
    places = ray.get([ask.remote(files) for _ in range(2)])
    assert places[0] == places[1]
    made = [entry.name for entry in (tmp_path / "cache" / "base-models").iterdir() if entry.is_dir()]
    assert made == [Path(places[0]).name]


def test_a_copy_that_breaks_off_leaves_nothing(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the message names the place; the next attempt starts anew."""
    with monkeypatch.context() as patch:
        patch.setattr(model_files, "_fetch", no_room)
        with pytest.raises(JobFailed, match="No space left"):
            fetched(files)
    assert not [entry for entry in (tmp_path / "cache" / "base-models").iterdir() if entry.is_dir()]
    assert fetched(files).is_dir()


def no_room(*_: Any) -> None:
    raise OSError(28, os.strerror(28))


def test_one_node_needs_no_copies(ray_cluster: None) -> None:
    """Nor does a model from a hub, which every node fetches itself."""
    assert start_files(BaseModelSpec(id=str(model_folder()))) is None
    assert start_files(BaseModelSpec(id="Qwen/Qwen2.5-0.5B")) is None
