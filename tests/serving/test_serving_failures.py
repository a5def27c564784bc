"""Parts that are killed under load, with real Serve and a real MLflow server.

Each test prints what it counted; docs/decisions/0040-proxy-health.md and
docs/decisions/0038-retry-dead.md have figures.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load import Load
from ray import serve
from ray_state import actors, eventually

from orchestrator.models.backbone import Backbone
from orchestrator.registry import Registry
from orchestrator.serving.app import APP_NAME, Server, start
from orchestrator.serving.deploy.options import ServeOptions

pytestmark = [pytest.mark.failure, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "test-key"
BODY = {"model": "story", "prompt": "the fox", "max_tokens": 8, "temperature": 0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class MlflowServer:
    """A tracking server that can be killed and started again on its store."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
        )
        assert eventually(self._answers)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except OSError:
            return False


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def registry(
    mlflow_server: MlflowServer,
    tmp_path_factory: pytest.TempPathFactory,
    backbone: Backbone,
    write_artifact: Any,
) -> Registry:
    folder = tmp_path_factory.mktemp("prompts")
    registry = Registry(mlflow_server.url, cache_dir=folder / "cache")
    with registry.start_search("serving", {}, {}) as search:
        for version in (1, 2):
            artifact = write_artifact(
                folder / str(version), backbone, tokens=5, seed=version, template="{text}"
            )
            registry.register(artifact, "story", search.run_id)
        registry.set_alias("story", "champion", 1)
    return registry


def serving(registry: Registry, **more: Any) -> Server:
    os.environ["ORCHESTRATOR_API_KEYS"] = KEY
    try:
        options = ServeOptions(port=free_port(), cpus=1, poll_seconds=0.5, drain_seconds=20, **more)
        return start(options, registry)
    finally:
        del os.environ["ORCHESTRATOR_API_KEYS"]


@pytest.fixture(scope="module")
def server(registry: Registry, ray_cluster: None) -> Iterator[Server]:
    """One replica behind the front."""
    server = serving(registry, retry_dead=True)
    yield server
    server.close()


def kill(named: str) -> None:
    """Send SIGKILL to the only process of an actor class."""
    (info,) = actors(named).values()
    os.kill(info["Pid"], signal.SIGKILL)


def after_kill(load: Load, what: str, act: Any, failed_before: int = 0) -> list[str]:
    """Kill something under load, and return the requests that failed.

    Waits until ten requests that began after the kill are answered.
    """
    load.until(lambda seen: sum(seen.values()) > 10)
    before, done = len(load.failed), time.monotonic()
    act()
    assert eventually(lambda: sum(begun > done for begun, _ in list(load.seconds)) >= 10)
    failed = load.failed[before:]
    later = [(begun, took) for begun, took in list(load.seconds) if begun > done]
    first = min(begun + took for begun, took in later) - done
    longest = max(took for begun, took in list(load.seconds) if begun + took > done)
    print(
        f"\n{what}: failed {dict(Counter(failed))}, answered meanwhile {len(later)}, "
        f"first answer to a later request after {first:.1f} s, longest request {longest:.1f} s"
    )
    return failed


def test_a_killed_replica_costs_no_request(server: Server) -> None:
    """The replica's requests are repeated on its successor.

    No part of an answer was sent before, so nothing is sent twice.
    """
    with Load(server.url, KEY, BODY, pause=0.05) as load:
        assert after_kill(load, "replica", lambda: kill("ServeReplica:orchestrator:prompts")) == []
    assert {version for version, _ in load.answers} == {"story:1"}
    assert len({tuple(texts) for _, texts in load.answers}) == 1


def test_a_killed_controller_is_not_noticed(server: Server) -> None:
    """Requests are answered without the controller, and it comes back."""
    with Load(server.url, KEY, BODY, pause=0.05) as load:
        assert after_kill(load, "controller", lambda: kill("ServeController")) == []
        assert eventually(lambda: actors("ServeController"))
    assert eventually(lambda: serve.status().applications[APP_NAME].status == "RUNNING")


def test_a_killed_proxy_comes_back(server: Server) -> None:
    """Connections to the proxy break, and its successor listens on the same port.

    After that nothing fails any more.
    """
    with Load(server.url, KEY, BODY, pause=0.25) as load:
        failed = after_kill(load, "proxy", lambda: kill("ProxyActor"))
        assert set(failed) <= {"ConnectError", "ReadError", "RemoteProtocolError", "500", "503"}
        settled = len(load.failed)
        load.until(lambda seen: sum(seen.values()) > 20)
        assert len(load.failed) == settled


def test_prompts_are_served_while_mlflow_is_dead(
    server: Server, registry: Registry, mlflow_server: MlflowServer
) -> None:
    """No request fails, and an alias that moves after the outage is followed."""
    with Load(server.url, KEY, BODY, pause=0.05) as load:
        assert after_kill(load, "MLflow server", mlflow_server.kill) == []
        load.until(lambda seen: sum(seen.values()) > 30)
        mlflow_server.start()
        registry.set_alias("story", "champion", 2)
        seconds = load.until(lambda seen: seen["story:2"] > 5)
        print(f"MLflow back: the moved alias answered after {seconds:.1f} s")
        registry.set_alias("story", "champion", 1)
        load.until(lambda seen: set(seen) == {"story:1"}, newest=20)
    assert load.failed == []
