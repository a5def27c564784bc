"""HAProxy as Serve's ingress, as ``orchestrator serve`` starts it.

Keys are enforced, and a killed replica costs no answer.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from load import Load
from test_serving_failures import BODY, KEY, free_port

from orchestrator.models.backbone import Backbone
from orchestrator.registry import Registry

pytestmark = [
    pytest.mark.failure,
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not shutil.which("haproxy"), reason="no haproxy here; on Debian: apt-get install haproxy"
    ),
]

START_S = 240.0
CLIENTS = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, write_artifact: Any) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    uri = f"sqlite:///{folder}/mlflow.db"
    registry = Registry(uri, cache_dir=folder / "cache")
    with registry.start_search("serving", {}, {}) as search:
        artifact = write_artifact(folder / "prompt", backbone, tokens=5, seed=1, template="{text}")
        registry.register(artifact, "story", search.run_id)
    registry.set_alias("story", "champion", 1)
    return uri


@pytest.fixture(scope="module")
def server(
    store: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, psutil.Process]]:
    """Two replicas behind HAProxy: its address and the process."""
    port, folder = free_port(), tmp_path_factory.mktemp("haproxy")
    changes = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(shutil.which("haproxy")),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "MLFLOW_TRACKING_URI": store,
        "ORCHESTRATOR_API_KEYS": KEY,
    }
    argv = [sys.executable, "-m", "orchestrator", "serve", "--port", str(port), "--replicas", "2"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(argv, env=os.environ | changes, stdout=log, stderr=log, cwd=folder)
    try:
        _await(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
        log.close()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def replicas(server: psutil.Process) -> list[psutil.Process]:
    return [
        child
        for child in server.children(recursive=True)
        if "ServeReplica" in " ".join(child.cmdline())
    ]


def test_keys_hold(server: tuple[str, psutil.Process]) -> None:
    url, _ = server
    assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 401
    answer = httpx.post(
        f"{url}/v1/completions", json=BODY, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert answer.status_code == 200 and answer.json()["system_fingerprint"] == "story:1"


def test_a_killed_replica_costs_no_answer(server: tuple[str, psutil.Process]) -> None:
    """Requests of a killed replica are repeated on the other, and a successor joins.

    Meanwhile HAProxy loads a new configuration and closes idle connections; a client that is about
    to use one has to send its request again.
    """
    url, process = server
    victim = replicas(process)[0]
    with Load(url, KEY, BODY, clients=CLIENTS) as load:
        load.until(lambda seen: sum(seen.values()) > 20)
        victim.kill()
        load.until(lambda seen: sum(seen.values()) > 100)
        deadline = time.monotonic() + START_S
        while len(replicas(process)) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        load.until(lambda seen: sum(seen.values()) > 20)
    print(
        f"\nHAProxy, a replica of two killed: {len(load.answers)} answered, "
        f"failed {dict(Counter(load.failed))}"
    )
    assert (
        set(load.failed) <= {"RemoteProtocolError"}
        and len(load.failed) <= CLIENTS
        and len(replicas(process)) == 2
    )
    assert len({tuple(texts) for _, texts in load.answers}) == 1
