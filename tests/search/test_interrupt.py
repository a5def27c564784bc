"""Ctrl-C and SIGTERM during ``orchestrator run``, in a process with its own Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from ray_state import eventually
from small_jobs import write_job

LIMIT_S = 200.0  # reached only when something hangs


def to_the_group(process: subprocess.Popen[str]) -> int:
    """Press Ctrl-C: a terminal signals every process of the foreground group."""
    os.killpg(process.pid, signal.SIGINT)
    return 130


def to_the_process(process: subprocess.Popen[str]) -> int:
    """Send SIGTERM, and again before the process has finished its clean-up."""
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    return 143


@pytest.fixture(params=[pytest.param(to_the_group, marks=pytest.mark.long), to_the_process])
def interrupted(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Interrupt a long search after its first evaluation; return what remains of it."""
    train = {"steps": 1_000_000, "batch_size": 4, "evaluate_every": 10}
    job = write_job(tmp_path, train=train, search__scheduler="fifo", resources__trials_per_worker=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(job), "--json"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if " step 20/" in line:
                break
        descendants = psutil.Process(process.pid).children(recursive=True)
        code = request.param(process)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    names = {child.pid: child for child in descendants}
    eventually(lambda: not [child for child in names.values() if alive(child)])
    left = [child for child in names.values() if alive(child)]
    said = {"out": out, "err": "".join(seen) + err}
    return {"code": process.returncode, "wanted": code, "left": left, "had": len(names), **said}


def heed_interrupts() -> None:
    """Restore Python's SIGINT handling, as in a terminal.

    Background jobs of a shell script ignore SIGINT and pass this on to their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ray  # the command starts its own Ray
def test_an_interrupt_leaves_everything_closed(interrupted: dict[str, Any], tmp_path: Path) -> None:
    """An interrupt gives the signal's exit code and names the next step.

    All MLflow runs are KILLED and no process is left.
    """
    assert interrupted["code"] == interrupted["wanted"], interrupted["err"]
    assert "Traceback" not in interrupted["err"]
    (search,) = (tmp_path / ".orchestrator" / "searches").iterdir()
    assert f"interrupted\n  next: orchestrator resume {search.name}   goes on" in interrupted["err"]
    document = json.loads(interrupted["out"])
    assert document["error"]["next"] == f"orchestrator resume {search.name}"
    assert (document["status"], document["error"]["exit_code"]) == (
        "interrupted",
        interrupted["wanted"],
    )
    assert interrupted["had"] > 3 and interrupted["left"] == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["KILLED"]
    assert len(runs) == 3 and {run.info.status for run in runs} == {"KILLED"}
    assert client.search_registered_models() == []
