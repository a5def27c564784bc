"""A program run in processes of its own, with what it took: seconds from start to end, and the memory of its tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
OUT = "out.json"  # what the program leaves in its working directory
LIMIT_S = 3600.0
OTHERS = ("MLFLOW_", "RAY_", "ORCHESTRATOR_")  # variables that would lead the program out of its folder
SAMPLE_S = 1.0
MEGABYTE = 2**20


class Broken(RuntimeError):
    """The program ended with an error, or did not end."""


@dataclass
class Ran:
    """``started`` is by the clock that the program's own times are of (time.time)."""

    started: float
    seconds: float
    peak: int
    """Bytes that the program and all its descendants held at once, pages that they share counted once."""
    load: float
    """Processes that wanted to run on this machine, on average over the program's time: its own and those of others."""
    found: dict[str, Any] = field(default_factory=dict)


def run(module: str, arguments: dict[str, Any], folder: Path, limit_s: float = LIMIT_S) -> Ran:
    """``python -m module JSON`` in ``folder``, until it ends. Raises Broken with the end of what it wrote."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(OTHERS)},
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    log = folder / "log.txt"
    before, started = psutil.cpu_times(), time.time()
    with log.open("wb") as stream:
        command = [sys.executable, "-m", module, json.dumps(arguments)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        with TreeMemory(process.pid) as memory:
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                raise Broken(f"{module} took more than {limit_s:.0f} s:\n{_end(log)}") from None
    seconds = time.time() - started
    if code or not (folder / OUT).is_file():
        raise Broken(f"{module} ended with exit code {code}:\n{_end(log)}")
    found = json.loads((folder / OUT).read_text())
    return Ran(started, seconds, memory.peak, _busy(before) / seconds, found)


def run_in(folder: str, name: str, arguments: dict[str, Any], limit_s: float = LIMIT_S) -> Ran:
    """A program of this folder's, which is told where it works."""
    return run(f"tests.benchmarks.{name}", {**arguments, "folder": folder}, Path(folder), limit_s)


def _busy(before: Any) -> float:
    """Seconds of the machine's cores that were worked since, by whomever."""
    now = psutil.cpu_times()
    return float(sum(getattr(now, part) - getattr(before, part) for part in ("user", "nice", "system")))


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


class TreeMemory:
    """Samples the memory of a process and of all that it started. A page that n processes share counts as one."""

    def __init__(self, pid: int, every_s: float = SAMPLE_S) -> None:
        self.peak = 0
        self._root = psutil.Process(pid)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            self.peak = max(self.peak, tree_bytes(self._root))


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size of the process and its descendants, now."""
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peak_bytes(pid: int) -> int:
    """The most that a process has held in memory so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
