"""deploy/kubernetes/base/redis.yaml: the container's command, on a real Redis."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.manifests import KUBERNETES, documents


def redis_cli(port: int, *command: str, password: str = "") -> str:
    environment = os.environ | ({"REDISCLI_AUTH": password} if password else {})
    argv = ["redis-cli", "-p", str(port), *command]
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def test_redis_wants_the_password_and_writes_everything(tmp_path: Path) -> None:
    """The manifest's command starts a Redis that requires the Secret's password.

    Its data survives a SIGKILL.
    """
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: redis)")
    (workload,) = [
        it for it in documents(KUBERNETES / "base" / "redis.yaml") if it["kind"] == "StatefulSet"
    ]
    container = workload["spec"]["template"]["spec"]["containers"][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    script = container["args"][0].replace("dir /data", f"dir {tmp_path}\nport {port}")
    environment = os.environ | {"REDIS_PASSWORD": "a-password"}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*container["command"], script], env=environment, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while redis_cli(port, "ping", password="a-password") != "PONG":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        return process

    process = start()
    try:
        assert redis_cli(port, "set", "node", "1", password="a-password") == "OK"
        assert "NOAUTH" in redis_cli(port, "get", "node")
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start()
        assert redis_cli(port, "get", "node", password="a-password") == "1"
    finally:
        process.kill()
        process.wait()
