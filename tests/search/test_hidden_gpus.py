"""Searches on a node whose Ray counts a GPU that torch can't use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hidden_gpu import NEEDS_NONE, hidden_gpu
from ray.cluster_utils import Cluster
from small_jobs import write_job

WARNING = "warning: torch sees none of the GPUs that Ray gave the workers: they train on CPUs"
TRIALS = {
    "search__trials": 2,
    "search__scheduler": "fifo",
    "train__steps": 4,
    "registry__register_top": 0,
}

pytestmark = [pytest.mark.long, pytest.mark.timeout(600), NEEDS_NONE]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with hidden_gpu() as made:
        yield made


def run_on(cluster: Cluster, folder: Path, gpus: float | str) -> subprocess.CompletedProcess[str]:
    resources = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": gpus}
    job = write_job(folder, **TRIALS, resources=resources)
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "run",
        str(job),
        "--address",
        cluster.address,
        "--json",
    ]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=300)


def test_a_job_that_takes_what_there_is_says_that_it_trains_on_cpus(
    cluster: Cluster, tmp_path: Path
) -> None:
    ran = run_on(cluster, tmp_path, "auto")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(WARNING) == 1
    assert json.loads(ran.stdout)["workers"]["w0"]["device"] == "cpu"


def test_a_job_that_asks_for_gpus_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    ran = run_on(cluster, tmp_path, 1)
    assert ran.returncode == 1, ran.stderr
    error = json.loads(ran.stdout)["error"]
    assert error["message"].startswith("resources.gpus_per_worker: 1: torch ")
    assert (
        "sees none of the GPUs" in error["message"]
        and "resources.gpus_per_worker: 0" in error["next"]
    )


def test_a_job_that_asks_for_none_says_nothing(cluster: Cluster, tmp_path: Path) -> None:
    ran = run_on(cluster, tmp_path, 0)
    assert ran.returncode == 0, ran.stderr
    assert "warning: torch" not in ran.stderr
