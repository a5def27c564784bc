"""A search in Python, from a data frame to a registered prompt, on a real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_jobs import Recorder, job_document

import orchestrator as po
from orchestrator.job.spec import DataFiles
from orchestrator.tuning.reports import Report


def interrupting(report: Report) -> None:
    """Press Ctrl-C at the first evaluation, and once more before the search has ended."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.ray
def test_a_search_on_frames_is_interrupted_and_resumed_inside_a_running_event_loop(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a notebook runs in a loop; the search ends resumably, and goes on from there.

    Handlers of signals are put back, and the frames are read from the files that hold them.
    """
    monkeypatch.chdir(tmp_path)
    document = job_document(tmp_path)
    files: dict[str, str] = document["data"]["path"]
    document["data"]["path"] = {
        split: pd.read_json(file, lines=True) for split, file in files.items()
    }
    document["search"] |= {"trials": 2, "scheduler": "fifo"}
    for file in files.values():
        Path(file).unlink()
    job = po.Job(document)
    # As in a notebook's kernel; ignored in the background jobs of a shell.
    before = signal.default_int_handler
    ignored = signal.signal(signal.SIGINT, before)

    async def cell() -> Any:
        with pytest.raises(po.Interrupted) as found:
            po.run(job, progress=Recorder(job, interrupting))
        return found.value

    error = asyncio.run(cell())
    unfinished = po.load_search("latest")
    assert error.hint.startswith(f"orchestrator.resume('{unfinished.id}') in Python")
    assert not unfinished.finished and signal.getsignal(signal.SIGINT) == before
    signal.signal(signal.SIGINT, ignored)
    result = po.resume(unfinished.id, progress=False)
    assert result.id == unfinished.id and result.finished and result.model == "tiny:1"
    assert set(result.trials.status) == {"finished"} and (result.trials.steps == 16).all()
    assert result.curves.groupby("trial").size().to_dict() == {"t000": 4, "t001": 4}
    assert isinstance(result.job.data.path, DataFiles)
    assert Path(result.job.data.path.train).parent == tmp_path / ".orchestrator" / "data"
    assert json.loads((result.folder / "result.json").read_text())["model"]["version"] == 1
    assert po.load("tiny@champion").classify(["a quick fox"])[0]["label"] in (0, 1)
