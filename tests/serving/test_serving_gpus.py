"""Replicas on GPUs that torch can't use, or that there are none of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hidden_gpu import NEEDS_NONE, hidden_gpu
from ray_processes import free_ports

from orchestrator.backbone import Backbone
from orchestrator.registry import Registry

pytestmark = [pytest.mark.long, pytest.mark.timeout(600), NEEDS_NONE]
LIMIT_S = 120.0  # only a hang takes this long


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, write_artifact: Any) -> dict[str, str]:
    """A registry with one prompt, as the environment of a command."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    registry = Registry(uri, cache_dir=folder / "cache")
    with registry.start_search("serving", {}, {}) as search:
        registry.register(
            write_artifact(folder / "spam", backbone, verbalizer={0: " ham", 1: " spam"}), "spam", search.run_id
        )
        registry.set_alias("spam", "champion", 1)
    return {**os.environ, "MLFLOW_TRACKING_URI": uri, "ORCHESTRATOR_CACHE": str(folder / "cache")}


@pytest.fixture(scope="module")
def cluster(store: dict[str, str]) -> Iterator[dict[str, str]]:
    with hidden_gpu() as made:
        yield {**store, "RAY_ADDRESS": made.address}


def serve(environment: dict[str, str], folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", "serve", "spam", "--cpus", "1", *options]
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def refused(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize("asked", [(), ("--gpus", "1")], ids=["auto", "asked"])
def test_a_replica_that_cannot_use_its_gpu_says_so(
    cluster: dict[str, str], tmp_path: Path, asked: tuple[str, ...]
) -> None:
    """With the reason and the next step, not a line of torch's."""
    code, said = refused(serve(cluster, tmp_path, "--port", str(free_ports(1)[0]), *asked))
    assert code == 1, said
    assert "the serving application did not start: gpus: 1: torch" in said
    assert "next: install a torch for these GPUs and their driver on each node, or set gpus: 0" in said


def test_a_replica_that_asks_for_none_computes_on_cpus(cluster: dict[str, str], tmp_path: Path) -> None:
    port = free_ports(1)[0]
    process = serve(cluster, tmp_path, "--port", str(port), "--gpus", "0")
    try:
        answered(port, process)
        process.send_signal(signal.SIGTERM)
        code, said = refused(process)
        assert code == 143, said
    finally:
        process.kill()


def test_more_gpus_than_this_machine_has_are_refused(store: dict[str, str], tmp_path: Path) -> None:
    """Serve would wait for them in vain."""
    code, said = refused(serve(store, tmp_path, "--port", str(free_ports(1)[0]), "--gpus", "1"))
    assert code == 2, said
    assert "the replicas need 1 GPU, this machine has 0" in said


def answered(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("the server does not answer")
