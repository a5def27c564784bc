"""A node without the base model's folder fetches one copy, through the real object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from models import model_folder
from ray.cluster_utils import Cluster
from small_jobs import write_job

from orchestrator.errors import JobFailed
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.source import resolve_model
from orchestrator.search.workers import model_files
from orchestrator.search.workers.model_files import ModelFiles, fetched, model_source, start_files


@pytest.fixture
def files(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    actor = ray.remote(num_cpus=0)(ModelFiles).remote(model_folder(), chunk=1000)
    yield actor
    ray.kill(actor)


def test_a_copy_is_the_folder(files: Any, tmp_path: Path) -> None:
    """The copy has every file, byte for byte, and is used again.

    It is sent in pieces, and the source keeps the id of the spec.
    """
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
    """Workers of one node that ask at the same time get one folder, with no partial copy."""
    cache = {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")}
    ask = ray.remote(num_cpus=0.1, runtime_env={"env_vars": cache})(
        lambda actor: str(fetched(actor))
    )
    places = ray.get([ask.remote(files) for _ in range(2)])
    assert places[0] == places[1]
    made = [
        entry.name for entry in (tmp_path / "cache" / "base-models").iterdir() if entry.is_dir()
    ]
    assert made == [Path(places[0]).name]


def test_a_copy_that_breaks_off_leaves_nothing(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk raises an error that says so; the next attempt starts from the beginning."""
    with monkeypatch.context() as patch:
        patch.setattr(model_files, "_fetch", no_room)
        with pytest.raises(JobFailed, match="No space left"):
            fetched(files)
    assert not [entry for entry in (tmp_path / "cache" / "base-models").iterdir() if entry.is_dir()]
    assert fetched(files).is_dir()


def no_room(*_: Any) -> None:
    raise OSError(28, os.strerror(28))


def test_one_node_needs_no_copies(ray_cluster: None) -> None:
    """A single node needs no copy, nor does a hub model, which each node downloads itself."""
    assert start_files(BaseModelSpec(id=str(model_folder()))) is None
    assert start_files(BaseModelSpec(id="Qwen/Qwen2.5-0.5B")) is None


@pytest.fixture
def poor_node(tmp_path: Path) -> Iterator[tuple[Cluster, Path]]:
    """Start a head of one core and a node of one core for which the model's folder is empty."""
    hidden = tmp_path / "models"
    shutil.copytree(model_folder(), hidden / "model")
    inside = ["unshare", "-m", "sh", "-c"]
    hide = f"mount -t tmpfs tmpfs {hidden}"
    if (tried := subprocess.run([*inside, hide], capture_output=True, text=True)).returncode:
        pytest.skip(f"a node can't have its own view of the disk here: {tried.stderr.strip()}")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    start = f"ray start --address {cluster.address} --num-cpus 1 --block --disable-usage-stats"
    node = subprocess.Popen(
        [*inside, f"{hide} && exec {Path(sys.executable).parent}/{start}"],
        env=os.environ | {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    yield cluster, hidden / "model"
    os.killpg(node.pid, signal.SIGTERM)
    node.wait()
    cluster.shutdown()


@pytest.mark.long
def test_a_node_without_the_folder_trains_too(
    poor_node: tuple[Cluster, Path], tmp_path: Path
) -> None:
    """A search trains on both nodes, with one copy in the cache of the node without the files."""
    cluster, model = poor_node
    resources = {"workers": 2, "cpus_per_worker": 1, "trials_per_worker": 1}
    train = {
        "steps": 1000,
        "batch_size": 4,
        "evaluate_every": 100,
    }  # long enough for the other worker to start
    job = write_job(
        tmp_path,
        base_model__id=str(model),
        search__scheduler="fifo",
        resources=resources,
        train=train,
    )
    ran = subprocess.run(
        [
            sys.executable, "-m", "orchestrator", "run", str(job),
            "--address", cluster.address, "--json",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert len({worker["node"] for worker in document["workers"].values()}) == 2
    assert {name for trial in document["trials"] for name in trial["workers"]} == {"w0", "w1"}
    (copy,) = [entry for entry in (tmp_path / "cache" / "base-models").iterdir() if entry.is_dir()]
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
