"""A head that restarts with its state in a real Redis; its workers reconnect."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_processes import RayProcesses, ray_processes
from small_jobs import close, write_job

from tests.submission.test_submission_cluster import LIMIT_S, Orchestrator, heard, trials

pytestmark = [pytest.mark.failure, pytest.mark.long, pytest.mark.timeout(900)]

WORKER_IDS = """
from ray.util.state import list_nodes
print(*(it.node_id for it in list_nodes() if it.state == "ALIVE" and not it.is_head_node))
"""


@pytest.fixture
def cluster() -> Iterator[RayProcesses]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: redis)")
    with ray_processes(redis=True) as made:
        yield made


def worker_nodes(cluster: RayProcesses) -> list[str]:
    return cluster.run(
        [sys.executable, "-c", WORKER_IDS], RAY_API_SERVER_ADDRESS=cluster.url
    ).stdout.split()


def test_a_search_outlives_a_head_that_comes_back(cluster: RayProcesses, tmp_path: Path) -> None:
    """A search goes on after the head, with the driver on it, died and was started again.

    The worker node stays alive. The submitter waits and submits again, and the search ends as an
    undisturbed one.
    """
    train = {"steps": 400, "batch_size": 4, "evaluate_every": 50}
    resources = {"workers": 2, "cpus_per_worker": 1, "trials_per_worker": 1}
    job = write_job(
        tmp_path, train=train, search__trials=4, search__scheduler="fifo", resources=resources
    )
    orchestrator = Orchestrator(cluster, tmp_path)
    whole = orchestrator("submit", job, "--home", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.err
    before = worker_nodes(cluster)
    submitter = orchestrator.start(
        "submit", job, "--home", tmp_path / "home", "--retries", "1", "--json"
    )
    said = heard(submitter, lambda text: " step 200/" in text)
    cluster.kill_node(0)
    cluster.start_node(0)
    out, err = submitter.communicate(timeout=2 * LIMIT_S)
    assert submitter.returncode == 0, said + err
    assert "was lost; submitting it again" in err and "going on with search" in err
    assert worker_nodes(cluster) == before != []
    document, expected = json.loads(out)["result"], whole.document["result"]
    assert close(trials(document), trials(expected))
    assert close(document["best"], expected["best"])
