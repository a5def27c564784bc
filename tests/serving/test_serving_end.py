"""A server that is ended by a signal of a service manager, container engine or ``timeout``."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from ray_processes import free_ports
from serve_process import LIMIT_S, ended, serve, until_answered

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_server_and_what_it_started(
    spam_store: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """The server reports the signal, has its own exit code, and leaves no Ray process."""
    (port,) = free_ports(1)
    process = serve(spam_store, tmp_path, "--port", str(port))
    try:
        until_answered(port, process)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.send_signal(number)
        code, said = ended(process)
    finally:
        process.kill()
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], said
    assert "interrupted" in said and "Traceback" not in said and "***" not in said
    deadline = time.monotonic() + LIMIT_S
    while (
        left := [it for it in started if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]
    ) and (time.monotonic() < deadline):
        time.sleep(0.2)
    assert not left
