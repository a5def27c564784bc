"""Run a program in its own processes and measure its seconds and the memory of its process tree."""

from __future__ import annotations

import json
import math
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
OUT = "out.json"  # the program writes its result to its working directory
LIMIT_S = 3600.0
# Environment variables that could lead the program out of its folder.
OTHERS = ("MLFLOW_", "RAY_", "ORCHESTRATOR_")
SAMPLE_S = 1.0
MEGABYTE = 2**20


class Broken(RuntimeError):
    """The program ended with an error, or did not end in time."""


@dataclass
class Ran:
    """A finished program; ``started`` is by time.time, like the times in its result."""

    started: float
    seconds: float
    peak: int
    """Most bytes of the program and its descendants at one time; shared pages count once."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Moments, and the number of processes on this machine that ran or wanted to run."""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def load(self) -> float:
        return self.load_between(0.0, math.inf)

    def load_between(self, start: float, end: float) -> float:
        """Return the average number of processes that ran or wanted to.

        If there were more than cores, everything took longer.
        """
        within = [running for moment, running in self.samples if start <= moment < end]
        return sum(within) / len(within) if within else math.nan


def run(module: str, arguments: dict[str, Any], folder: Path, limit_s: float = LIMIT_S) -> Ran:
    """Run ``python -m module JSON`` in ``folder`` until it ends.

    Raises Broken with the end of the program's output.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(OTHERS)},
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    log = folder / "log.txt"
    started = time.time()
    with log.open("wb") as stream:
        command = [sys.executable, "-m", module, json.dumps(arguments)]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        with Watch(process.pid) as watch:
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
    return Ran(started, seconds, watch.peak, watch.samples, found)


def run_in(folder: str, name: str, arguments: dict[str, Any], limit_s: float = LIMIT_S) -> Ran:
    """Run a program of this package in a folder, which it gets as ``folder``."""
    return run(f"tests.benchmarks.{name}", {**arguments, "folder": folder}, Path(folder), limit_s)


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


class Watch:
    """Samples of the memory of a process tree and of the machine's load."""

    def __init__(self, pid: int, every_s: float = SAMPLE_S) -> None:
        self.peak = 0
        self.samples: list[tuple[float, int]] = []
        self._root = psutil.Process(pid)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            self.samples.append((time.time(), running()))
            self.peak = max(self.peak, tree_bytes(self._root))


def running() -> int:
    """Return the number of processes that run or wait for a core, without this process."""
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("procs_running")) - 1


def tree_bytes(root: psutil.Process) -> int:
    """Return the proportional set size of the process and its descendants now.

    A page that n processes share counts once.
    """
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
