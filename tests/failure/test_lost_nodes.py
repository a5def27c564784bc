"""A search on three nodes, with and without losing one: real raylets on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from small_jobs import close, write_job

LIMIT_S = 400.0  # reached only when something hangs
PROMPTLY = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}

pytestmark = [
    pytest.mark.failure,
    pytest.mark.long,
    pytest.mark.timeout(900),
]  # each test runs several whole searches


NOTICE_S = 8  # seconds between a cloud's notice and the end of the machine


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """Start nodes of one core each, so that each holds exactly one worker."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": PROMPTLY},
    )
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with three_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run the undisturbed search on all nodes."""
    with three_nodes() as cluster:
        return run_on(cluster, tmp_path_factory.mktemp("whole") / "job")


@dataclass(frozen=True)
class Ran:
    """The result of ``orchestrator run --json``."""

    document: dict[str, Any]
    said: str

    @property
    def workers(self) -> list[set[str]]:
        """Return the workers that trained each trial."""
        return [set(trial["workers"]) for trial in self.document["trials"]]

    @property
    def found(self) -> list[dict[str, Any]]:
        return [{**trial, "workers": None} for trial in self.document["trials"]]


def run_on(
    cluster: Cluster,
    folder: Path,
    on_line: Callable[[str], None] = lambda line: None,
    workers: int | str = 3,
    steps: int = 800,  # seconds a trial, since the last worker may start late
) -> Ran:
    """Run nine trials on three workers in a process; ``on_line`` gets its progress."""
    folder.mkdir()
    train = {"steps": steps, "batch_size": 4, "evaluate_every": 50}
    resources = {"workers": workers, "cpus_per_worker": 1, "trials_per_worker": 1}
    job = write_job(
        folder, train=train, search__trials=9, search__scheduler="fifo", resources=resources
    )
    process = subprocess.Popen(
        [
            sys.executable, "-m", "orchestrator", "run", str(job),
            "--address", cluster.address, "--json",
        ],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
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


class Under:
    """Watches a search's progress and acts on one node once three trials have begun."""

    def __init__(self, cluster: Cluster, act: Callable[[Any], None]) -> None:
        self.cluster = cluster
        self.act = act
        self.seen: set[str] = set()
        self.node = ""

    def __call__(self, line: str) -> None:
        if found := re.search(r"\b(t00[0-2])\b.* step \d", line):
            self.seen.add(found[1])
        if len(self.seen) == 3 and not self.node:
            node = next(iter(self.cluster.worker_nodes))
            self.node = node.node_id
            self.act(node)


def check_went_on(disturbed: Ran, whole: Ran, lost_node: str) -> set[str]:
    """Check that a trial of the lost node went on elsewhere and that all ended as usual.

    Returns the workers that were on the lost node to their end: one, or none where the broker died
    with it (the driver may have joined the cluster by that very node), since the groups that come
    after it have the same names.
    """
    nodes = {name: worker["node"] for name, worker in disturbed.document["workers"].items()}
    assert set.union(*disturbed.workers) <= set(nodes), "where each worker was is known"
    assert any(len(workers) > 1 for workers in disturbed.workers), disturbed.said
    assert close(disturbed.found, whole.found)
    assert close(disturbed.document["best"], whole.document["best"])
    lost = {name for name, node in nodes.items() if node == lost_node}
    assert len(lost) <= 1
    return lost


def test_every_node_trains(whole: Ran) -> None:
    """Three workers on three nodes train trials of one search."""
    assert set.union(*whole.workers) == {"w0", "w1", "w2"}, whole.said
    assert len({worker["node"] for worker in whole.document["workers"].values()}) == 3, (
        whole.document["workers"]
    )


def test_a_lost_node_costs_nothing(cluster: Cluster, whole: Ran, tmp_path: Path) -> None:
    """A killed node's trial goes on elsewhere; every trial ends with the same result."""
    kill = Under(cluster, lambda node: cluster.remove_node(node, allow_graceful=False))
    disturbed = run_on(cluster, tmp_path / "disturbed", kill)
    lost = check_went_on(disturbed, whole, kill.node)
    assert not any(workers <= lost for workers in disturbed.workers), (
        "the trial of the lost node ended where it began"
    )


def test_a_machine_that_is_taken_back_costs_nothing(
    cluster: Cluster, whole: Ran, tmp_path: Path
) -> None:
    """A search survives a node that is drained with a notice and then removed.

    An autoscaler passes a cloud's notice on to Ray in this way.
    """
    taken: list[threading.Timer] = []

    def give_notice(node: Any) -> None:
        drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        drain += ["--deadline-remaining-seconds", str(NOTICE_S)]
        subprocess.run(
            [str(Path(sys.executable).parent / "ray"), *drain], check=True, capture_output=True
        )
        taken.append(threading.Timer(NOTICE_S, cluster.remove_node, [node, False]))
        taken[0].start()

    notice = Under(cluster, give_notice)
    disturbed = run_on(cluster, tmp_path / "disturbed", notice)
    taken[0].join()
    check_went_on(disturbed, whole, notice.node)


def test_a_node_that_comes_later_trains_too(tmp_path: Path) -> None:
    """A search on one node uses a second node that joins later, and finishes every trial."""
    small = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
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
