"""Ctrl-C in the middle of ``orchestrator run``: a process and a Ray of its own, as on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from ray_state import eventually
from small_jobs import write_job

LIMIT_S = 200.0  # only a hang takes this long


@pytest.fixture
def interrupted(tmp_path: Path) -> dict[str, Any]:
    """A search with hours to go, interrupted after its first evaluation; what was left of it."""
    train = {"steps": 1_000_000, "batch_size": 4, "evaluate_every": 10}
    job = write_job(tmp_path, train=train, search__grace_steps=1_000_000, resources__trials_per_worker=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(job), "--json"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if " step 20/" in line:
                break
        descendants = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells every process of the foreground group
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    names = {child.pid: child for child in descendants}
    eventually(lambda: not [child for child in names.values() if alive(child)])
    left = [child for child in names.values() if alive(child)]
    return {"code": process.returncode, "out": out, "err": "".join(seen) + err, "left": left, "had": len(names)}


def heed_interrupts() -> None:
    """A job in the background of a script is told to ignore interrupts, and passes that on; a terminal's is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interrupt_leaves_everything_closed(interrupted: dict[str, Any], tmp_path: Path) -> None:
    """Exit code 130, a message with the next step, MLflow runs KILLED and none running, no process left behind."""
    assert interrupted["code"] == 130, interrupted["err"]
    assert "Traceback" not in interrupted["err"]
    assert "interrupted\n  next: orchestrator run " in interrupted["err"]
    assert json.loads(interrupted["out"])["status"] == "interrupted"
    assert interrupted["had"] > 3 and interrupted["left"] == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["KILLED"]
    assert len(runs) == 3 and {run.info.status for run in runs} == {"KILLED"}
    assert client.search_registered_models() == []
