"""Record the processes of a Ray that a search started, to end those that outlive the search."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil

from orchestrator.utils.atomic import write_whole

PATIENCE_S = 5.0


def save_processes(file: Path) -> None:
    """Write down this process's descendants, each by its id and its start time.

    The system reuses ids, but an id with a start time identifies a process. Ray's agents outlive a
    killed driver by minutes, and hold its ports and memory.
    """
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found.append({"pid": child.pid, "started": child.create_time()})
    write_whole(file, json.dumps(found).encode())


def end_processes(file: Path) -> int:
    """End the saved processes that still run; return how many there were.

    They are terminated first, and killed if they do not end. Only for a search that is over.
    """
    if not file.exists():
        return 0
    left = [
        process
        for known in json.loads(file.read_bytes())
        if (process := _living(known["pid"], known["started"]))
    ]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    deaf = psutil.wait_procs(left, PATIENCE_S)[1]
    for process in deaf:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(deaf, PATIENCE_S)
    file.unlink()
    return len(left)


def _living(pid: int, started: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - started) < 1e-3 else None
    except psutil.Error:  # the process is gone, or its id now belongs to another user
        return None
