"""Going on with a search: after an interrupt in this process, and after the SIGKILL of a driver of its own."""

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
    """What a search found, without its name and its times."""
    return {key: document[key] for key in ("status", "trials", "best", "baselines", "model")}


def runs(folder: Path) -> list[Run]:
    return search_runs(f"sqlite:///{folder}/mlflow.db")


def histories(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each trial's validation losses as MLflow has them."""
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
    """Run the job until a trial's report comes, and interrupt it there, in the middle of a round."""

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
    """A search that was interrupted and has gone on, beside the same one that never was."""

    folder: Path
    interrupted: SearchFolder
    reports: dict[str, list[Report]]
    said: str
    document: dict[str, Any]
    undisturbed: Finished


@pytest.fixture(scope="module")
def resumed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    """Eight trials on fifo, two at a time, interrupted when two are over and two are under way."""
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
    """fifo: trials, metrics, best, baselines and version are to the last digit those of a search never interrupted."""
    assert found(resumed.document) == found(resumed.undisturbed.document)
    assert resumed.document["search"] == resumed.interrupted.id


def test_nothing_is_done_twice(resumed: Resumed) -> None:
    """Trials that were over do not run again, those under way go on from the end of a round, baselines are kept."""
    steps = {
        trial: [report.step for report in reports] for trial, reports in resumed.reports.items()
    }
    assert not {"t000", "t001"} & steps.keys()
    assert steps["t002"] == steps["t003"] == [12, 16]
    assert steps["t004"] == [4, 8, 12, 16]
    assert "without a prompt" not in resumed.said
    assert f"going on with search {resumed.interrupted.id}: 2 of 8 trials are over" in resumed.said


def test_mlflow_shows_one_search(resumed: Resumed) -> None:
    """One parent and a child a trial, all ended, each with every report once, as without the interrupt."""
    assert {run.info.status for run in runs(resumed.folder)} == {"FINISHED"}
    assert len(runs(resumed.folder)) == 9
    assert histories(resumed.folder) == histories(resumed.undisturbed.folder)


def test_a_finished_search_gives_its_document_again(
    resumed: Resumed, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an id's beginning: exit code 0, the same document, and no second version."""
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
    """The session's ASHA search as a process with a Ray of its own, killed in its second round and resumed here."""
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
    # At once: Ray's agents would go on for minutes.
    outlived = [child for child in descendants if alive(child)]
    return Killed(folder, search, before, len(descendants), outlived, document)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.failure
def test_a_killed_search_ends_as_an_undisturbed_one(killed: Killed, finished: Finished) -> None:
    """asha on one worker: the rungs know the earlier reports, so every trial stops where it would have."""
    assert 0 < killed.reports_before < sum(map(len, finished.reports.values()))
    assert close(found(killed.document), found(finished.document))


@pytest.mark.failure
def test_a_killed_search_leaves_no_process_and_no_run(killed: Killed, finished: Finished) -> None:
    """What Ray leaves of itself ends with the resumption; MLflow has every run once, ended, with every report once."""
    assert killed.had > 3 and killed.outlived == []
    assert {run.info.status for run in runs(killed.folder)} == {"FINISHED"}
    assert len(runs(killed.folder)) == 9
    assert close(histories(killed.folder), histories(finished.folder))


# What is refused


@pytest.fixture(scope="module")
def left(resumed: Resumed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a search that was interrupted, its data and its model in it."""
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
    """Who holds the lock runs the search: exit code 2, and nothing is touched."""
    monkeypatch.chdir(left)
    with find_search("latest").locked():
        said = command("resume", "latest")
    assert said.code == 2 and "still being run" in said.err


def test_other_data_is_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """Rows that changed since the search began: named, and exit code 2."""
    monkeypatch.chdir(left)
    rows = left / "train.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("a", "b", 1))
    said = command("resume", "latest")
    rows.write_text(text)
    assert said.code == 2 and "the data changed since it began" in said.err


def test_other_weights_are_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """A base model whose weights changed: named, exit code 2, and MLflow shows the search as it was."""
    monkeypatch.chdir(left)
    weights = left / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + b"\0\0\0\0")
    said = command("resume", "latest")
    weights.write_bytes(data)
    assert said.code == 2 and "the base model's weights changed" in said.err
    assert {run.info.status for run in runs(left)} == {"KILLED"}


def test_another_mlflow_is_refused(left: Path, command: Command, monkeypatch: Any) -> None:
    """A search goes on in the store that it began in; the message says how."""
    monkeypatch.chdir(left)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{left}/other.db")
    said = command("resume", "latest")
    assert said.code == 2 and f"MLFLOW_TRACKING_URI=sqlite:///{left}/mlflow.db" in said.err


def test_a_search_that_is_not_there(left: Path, command: Command, monkeypatch: Any) -> None:
    """The message lists what can be resumed; where there is nothing, how to begin."""
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
    """A checkpoint that was cut short: the trial begins again, the search ends with both trials finished or stopped."""
    monkeypatch.chdir(left)
    folder = find_search("latest")
    (damaged,) = folder.checkpoints.glob("t001-*")
    damaged.write_bytes(damaged.read_bytes()[:100])
    said = command("resume", folder.path, "--json")
    assert said.code == 0 and "t001 begins again" in said.err
    assert [trial["steps"] for trial in said.document["trials"]] == [16, 16]
    assert {run.info.status for run in runs(left)} == {"FINISHED"}
    assert json.loads(folder.result.read_bytes()) == said.document
