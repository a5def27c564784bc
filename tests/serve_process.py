"""``orchestrator serve`` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx

LIMIT_S = 120.0  # only a hang takes this long


def serve(environment: dict[str, str], folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", "serve", "spam", "--cpus", "1", *options]
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def until_answered(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("the server does not answer")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the process to end; return its exit code and its output."""
    try:
        said = process.communicate(timeout=LIMIT_S)[1]
    finally:
        process.kill()
    return process.returncode, said
