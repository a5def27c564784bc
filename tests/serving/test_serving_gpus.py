"""Replicas on GPUs that torch can't use, or that do not exist."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hidden_gpu import NEEDS_NONE, hidden_gpu
from ray_processes import free_ports
from serve_process import ended, serve, until_answered

pytestmark = [pytest.mark.long, pytest.mark.timeout(600), NEEDS_NONE]


@pytest.fixture(scope="module")
def cluster(spam_store: dict[str, str]) -> Iterator[dict[str, str]]:
    with hidden_gpu() as made:
        yield {**spam_store, "RAY_ADDRESS": made.address}


@pytest.mark.parametrize("asked", [(), ("--gpus", "1")], ids=["auto", "asked"])
def test_a_replica_that_cannot_use_its_gpu_says_so(
    cluster: dict[str, str], tmp_path: Path, asked: tuple[str, ...]
) -> None:
    """The error has the reason and the next step, not a message of torch."""
    code, said = ended(serve(cluster, tmp_path, "--port", str(free_ports(1)[0]), *asked))
    assert code == 1, said
    assert "the serving application did not start: gpus: 1: torch" in said
    assert (
        "next: install a torch for these GPUs and their driver on each node, or set gpus: 0" in said
    )


def test_a_replica_that_asks_for_none_computes_on_cpus(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """With ``--gpus 0`` the server answers.

    SIGTERM removes the application from a cluster that others started, too.
    """
    (port,) = free_ports(1)
    process = serve(cluster, tmp_path, "--port", str(port), "--gpus", "0")
    try:
        until_answered(port, process)
        process.send_signal(signal.SIGTERM)
        code, said = ended(process)
        assert code == 143, said
    finally:
        process.kill()


def test_more_gpus_than_this_machine_has_are_refused(
    spam_store: dict[str, str], tmp_path: Path
) -> None:
    """Serve would wait for missing GPUs forever."""
    code, said = ended(serve(spam_store, tmp_path, "--port", str(free_ports(1)[0]), "--gpus", "1"))
    assert code == 2, said
    assert "the replicas need 1 GPU, this machine has 0" in said
