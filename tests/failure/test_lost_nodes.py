"""A search on a cluster of three nodes, and the same with a node that dies: real raylets on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from small_jobs import close, write_job

LIMIT_S = 400.0  # only a hang takes this long
PROMPTLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}

pytestmark = [pytest.mark.failure, pytest.mark.long, pytest.mark.timeout(900)]  # whole searches, several a test


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes of one core: each holds one worker, and none two."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": PROMPTLY},
    )
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@dataclass(frozen=True)
class Ran:
    """What ``orchestrator run --json`` gave back."""

    document: dict[str, Any]
    said: str

    @property
    def workers(self) -> list[set[str]]:
        """Workers that each trial was trained by."""
        return [set(trial["workers"]) for trial in self.document["trials"]]

    @property
    def found(self) -> list[dict[str, Any]]:
        return [{**trial, "workers": None} for trial in self.document["trials"]]


def run_on(
    cluster: Cluster,
    folder: Path,
    on_line: Callable[[str], None] = lambda line: None,
    workers: int | str = 3,
    steps: int = 400,
) -> Ran:
    """Nine trials on three workers, as a process; ``on_line`` hears its progress."""
    folder.mkdir()
    train = {"steps": steps, "batch_size": 4, "evaluate_every": 50}
    resources = {"workers": workers, "cpus_per_worker": 1, "trials_per_worker": 1}
    job = write_job(folder, train=train, search__trials=9, search__scheduler="fifo", resources=resources)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(job), "--address", cluster.address, "--json"],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None and process.stdout is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            on_line(line)
        out = process.stdout.read()
        process.wait(LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 0, "".join(said)
    return Ran(json.loads(out), "".join(said))


def test_every_node_trains_and_a_lost_one_costs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Three workers on three nodes train trials of one search. With one node killed in the middle its trial goes on
    elsewhere, and every trial ends with the same result."""
    whole = run_on(cluster, tmp_path / "whole")
    assert len({worker["node"] for worker in whole.document["workers"].values()}) == 3
    assert set.union(*whole.workers) == {"w0", "w1", "w2"}

    killed: list[str] = []
    under_way: set[str] = set()

    def kill_a_node(line: str) -> None:
        if found := re.search(r"\b(t00[0-2])\b.* step \d", line):
            under_way.add(found[1])
        if len(under_way) == 3 and not killed:  # so that each worker has one
            node = next(iter(cluster.worker_nodes))
            killed.append(node.node_id)
            cluster.remove_node(node, allow_graceful=False)

    disturbed = run_on(cluster, tmp_path / "disturbed", kill_a_node)
    nodes = {name: worker["node"] for name, worker in disturbed.document["workers"].items()}
    # The driver may have joined the cluster by that very node: then the broker died too, and has forgotten the place.
    (lost,) = [name for name in ("w0", "w1", "w2") if nodes.get(name, killed[0]) == killed[0]]
    others = {"w0", "w1", "w2"} - {lost}
    assert {lost} not in disturbed.workers, "the trial of the lost node ended where it began"
    assert any(lost in workers and workers & others for workers in disturbed.workers)
    assert close(disturbed.found, whole.found)
    assert close(disturbed.document["best"], whole.document["best"])


def test_a_node_that_comes_later_trains_too(tmp_path: Path) -> None:
    """A search that began on one node takes a second one into use when it joins, and finds what it would have found."""
    small = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    added = []

    def add_a_node(line: str) -> None:
        if " step " in line and not added:
            added.append(small.add_node(num_cpus=1))

    try:
        ran = run_on(small, tmp_path / "grows", add_a_node, workers="auto", steps=2000)
    finally:
        small.shutdown()
    assert len(added) == 1
    assert ran.document["workers"]["w1"]["node"] == added[0].node_id
    assert set.union(*ran.workers) == {"w0", "w1"}
    assert [trial["status"] for trial in ran.document["trials"]] == ["finished"] * 9
