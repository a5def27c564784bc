"""Ending the processes that a killed search left behind, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

from orchestrator.search.state.processes import end_processes, save_processes

SLEEP = "import signal, sys, time; {}; print('up', flush=True); time.sleep(600)"


def sleeper(deaf: bool = False) -> subprocess.Popen[str]:
    code = SLEEP.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else "0")
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def kill(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def test_descendants_are_ended_by_id(tmp_path: Path) -> None:
    """Processes that heed SIGTERM and those that ignore it both end, and the file is removed."""
    polite, deaf = sleeper(), sleeper(deaf=True)
    file = tmp_path / "processes.json"
    try:
        save_processes(file)
        # This process has other descendants, such as the test session's Ray, which are not of
        # interest.
        mine = [
            known
            for known in json.loads(file.read_bytes())
            if known["pid"] in (polite.pid, deaf.pid)
        ]
        file.write_text(json.dumps(mine))
        assert end_processes(file) == 2
        assert not psutil.pid_exists(polite.pid) and not psutil.pid_exists(deaf.pid)
        assert not file.exists() and end_processes(file) == 0
    finally:
        kill(polite, deaf)


def test_another_process_of_the_same_id_is_left_alone(tmp_path: Path) -> None:
    """An id that now belongs to another process, or to none, is left alone."""
    process = sleeper()
    file = tmp_path / "processes.json"
    try:
        started = psutil.Process(process.pid).create_time()
        file.write_text(
            json.dumps(
                [{"pid": process.pid, "started": started - 60}, {"pid": 2**30, "started": 0.0}]
            )
        )
        assert end_processes(file) == 0
        assert process.poll() is None
    finally:
        kill(process)
