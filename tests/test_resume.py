"""Resuming a search after an interrupt in this process and after SIGKILL of its driver."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from models import model_folder
from small_jobs import Command, Finished, Recorder, close, run_search, search_runs, write_job

from orchestrator.errors import BadInput, Interrupted
from orchestrator.job.yaml import load_job
from orchestrator.registry import Registry
from orchestrator.search.resume import resume_search
from orchestrator.search.run import run_job
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.journal import read_history
from orchestrator.search.state.saved import find_search
from orchestrator.tuning.reports import Report


def found(document: dict[str, Any]) -> dict[str, Any]:
    """Return a search's results without its name and times."""
    return {key: document[key] for key in ("status", "trials", "best", "baselines", "model")}


def runs(folder: Path) -> list[Run]:
    return search_runs(f"sqlite:///{folder}/mlflow.db")


def histories(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each trial's validation losses from MLflow."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return {
        run.data.tags["orchestrator.trial"]: [
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, "validation_loss")
        ]
        for run in runs(folder)
        if "orchestrator.trial" in run.data.tags
    }


def interrupt_at(job_file: Path, trial: str, step: int) -> SearchFolder:
    """Run the job and interrupt it in the middle of a round, at the given report."""

    def interrupt(report: Report) -> None:
        if (report.trial, report.step) == (trial, step):
            raise KeyboardInterrupt

    job = load_job(job_file)
    with pytest.raises(Interrupted) as ended:
        run_job(job, Recorder(job, interrupt))
    assert ended.value.hint == f"orchestrator resume {find_search('latest').id}"
    return find_search("latest")


@dataclass(frozen=True)
class Resumed:
    """A search that was interrupted and resumed, and the same search without interrupt."""

    folder: Path
    interrupted: SearchFolder
    reports: dict[str, list[Report]]
    said: str
    document: dict[str, Any]
    undisturbed: Finished


@pytest.fixture(scope="module")
def resumed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    """Eight trials on fifo, two at a time, interrupted with two ended and two running."""
    folder = tmp_path_factory.mktemp("resumed")
    changes = {"search__scheduler": "fifo", "resources__trials_per_worker": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        job_file = write_job(folder, **changes)
        interrupted = interrupt_at(job_file, "t002", 12)
        recorders: list[Recorder] = []

        def progress(job: Any) -> Recorder:
            recorders.append(Recorder(job))
            return recorders[0]

        document, _ = resume_search("latest", progress)
        undisturbed = tmp_path_factory.mktemp("undisturbed")
        patch.chdir(undisturbed)
        other = run_search(job_file)
        yield Resumed(
            folder, interrupted, recorders[0].reports, recorders[0].said.getvalue(), document, other
        )


def test_a_resumed_search_ends_as_an_undisturbed_one(resumed: Resumed) -> None:
    """With fifo, all results equal those of an uninterrupted search to the last digit.

    These are trials, metrics, best trial, baselines and version.
    """
    assert found(resumed.document) == found(resumed.undisturbed.document)
    assert resumed.document["search"] == resumed.interrupted.id


def test_nothing_is_done_twice(resumed: Resumed) -> None:
    """Ended trials do not run again, running ones continue from a round's end.

    The baselines are kept as well.
    """
    steps = {
        trial: [report.step for report in reports] for trial, reports in resumed.reports.items()
    }
    assert not {"t000", "t001"} & steps.keys()
    assert steps["t002"] == steps["t003"] == [12, 16]
    assert steps["t004"] == [4, 8, 12, 16]
    assert "without a prompt" not in resumed.said
    assert f"going on with search {resumed.interrupted.id}: 2 of 8 trials are over" in resumed.said


def test_mlflow_shows_one_search(resumed: Resumed) -> None:
    """One parent and one child per trial have ended, with each report once."""
    assert {run.info.status for run in runs(resumed.folder)} == {"FINISHED"}
    assert len(runs(resumed.folder)) == 9
    assert histories(resumed.folder) == histories(resumed.undisturbed.folder)


def test_a_finished_search_gives_its_document_again(
    resumed: Resumed, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming a finished search exits with 0 and the same document, without a new version.

    The search is named by the beginning of its id.
    """
    monkeypatch.chdir(resumed.folder)
    said = command("resume", "tiny-", "--json")
    assert said.code == 0 and said.document == resumed.document
    assert "is finished" in said.err
    assert [it.version for it in Registry().versions("tiny")] == [1]


# A driver that is killed


@dataclass(frozen=True)
class Killed:
    """A search whose driver got SIGKILL, resumed by another process."""

    folder: Path
    search: SearchFolder
    reports_before: int
    had: int
    outlived: list[psutil.Process]
    document: dict[str, Any]


@pytest.fixture(scope="module")
def killed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """The session's ASHA search, run by a process with its own Ray.

    The process is killed in the second round, and the search is resumed here.
    """
    folder = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(finished.job_file), "--json"],
        cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if " step 8/" in line:
            break
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stderr.close()
    assert " step 8/" in said[-1], "".join(said)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search = find_search("latest")
        before = len(read_history(search).reports)
        document, _ = resume_search("latest", Recorder)
    # Kill all at once: Ray's agents would otherwise run on for minutes.
    outlived = [child for child in descendants if alive(child)]
    return Killed(folder, search, before, len(descendants), outlived, document)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.failure
def test_a_killed_search_ends_as_an_undisturbed_one(killed: Killed, finished: Finished) -> None:
    """With asha on one worker, every trial stops at the same step, as rungs keep their reports."""
    assert 0 < killed.reports_before < sum(map(len, finished.reports.values()))
    assert close(found(killed.document), found(finished.document))


@pytest.mark.failure
def test_a_killed_search_leaves_no_process_and_no_run(killed: Killed, finished: Finished) -> None:
    """Ray's leftover processes end with the resumption.

    MLflow has every run once, ended, with every report once.
    """
    assert killed.had > 3 and killed.outlived == []
    assert {run.info.status for run in runs(killed.folder)} == {"FINISHED"}
    assert len(runs(killed.folder)) == 9
    assert close(histories(killed.folder), histories(finished.folder))


# What is refused


@pytest.fixture(scope="module")
def left(resumed: Resumed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with an interrupted search, its data and its model."""
    folder = tmp_path_factory.mktemp("left")
    shutil.copytree(model_folder(), folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        interrupt_at(
            write_job(folder, base_model__id=str(folder / "model"), search__trials=2), "t000", 8
        )
    return folder


def test_a_search_that_is_being_run_is_left_alone(
    left: Path, command: Command, monkeypatch: Any
) -> None:
    """If another process holds the lock, resume exits with 2 and changes nothing."""
    monkeypatch.chdir(left)
    with find_search("latest").locked():
        said = command("resume", "latest")
    assert said.code == 2 and "still being run" in said.err


def test_other_data_is_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """Rows that changed since the search began are named, with exit code 2."""
    monkeypatch.chdir(left)
    rows = left / "train.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("a", "b", 1))
    said = command("resume", "latest")
    rows.write_text(text)
    assert said.code == 2 and "the data changed since it began" in said.err


def test_other_weights_are_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """Changed base model weights are named, with exit code 2; MLflow's runs stay unchanged."""
    monkeypatch.chdir(left)
    weights = left / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + b"\0\0\0\0")
    said = command("resume", "latest")
    weights.write_bytes(data)
    assert said.code == 2 and "the base model's weights changed" in said.err
    assert {run.info.status for run in runs(left)} == {"KILLED"}


def test_another_mlflow_is_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """A search must resume in the store where it began; the message says how."""
    monkeypatch.chdir(left)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{left}/other.db")
    said = command("resume", "latest")
    assert said.code == 2 and f"MLFLOW_TRACKING_URI=sqlite:///{left}/mlflow.db" in said.err


def test_a_search_that_is_not_there(left: Path, command: Command, monkeypatch: Any) -> None:
    """The message lists the searches that can be resumed, or else says how to begin."""
    monkeypatch.chdir(left)
    said = command("resume", "nothing", "--json")
    assert said.code == 2 and find_search("latest").id in said.document["error"]["next"]
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(left / "empty"))
    assert "orchestrator run JOB" in command("resume", "latest").err
    with pytest.raises(BadInput, match="not the folder of a search"):
        find_search(str(left / "model"))


def test_a_damaged_checkpoint_costs_its_trial_alone(
    left: Path, command: Command, monkeypatch: Any
) -> None:
    """A trial with a truncated checkpoint restarts, and the search ends with both trials ended."""
    monkeypatch.chdir(left)
    folder = find_search("latest")
    (damaged,) = folder.checkpoints.glob("t001-*")
    damaged.write_bytes(damaged.read_bytes()[:100])
    said = command("resume", folder.path, "--json")
    assert said.code == 0 and "t001 begins again" in said.err
    assert [trial["steps"] for trial in said.document["trials"]] == [16, 16]
    assert {run.info.status for run in runs(left)} == {"FINISHED"}
    assert json.loads(folder.result.read_bytes()) == said.document
