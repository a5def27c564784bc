"""Lost services: MLflow away for a while, a full disk, and a lost machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from object_store import object_store, why_no_object_store
from ray_state import eventually
from registry.conftest import Server
from small_jobs import Finished, Recorder, close, run_search, search_runs, write_job

from orchestrator.search.resume import resume_search
from orchestrator.search.state.journal import read_history
from orchestrator.search.state.object_store_copy import JOURNAL, RemoteHome
from orchestrator.search.state.saved import find_search
from orchestrator.tuning.reports import Report

AWAY_S = 60.0

pytestmark = [
    pytest.mark.failure,
    pytest.mark.long,
    pytest.mark.timeout(900),
]  # each test runs several whole searches


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path).start()
    yield running
    running.stop()


def test_mlflow_goes_away_and_comes_back(
    mlflow_server: Server, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow is killed during the search and returns a minute later.

    The result is that of an undisturbed search; every run has ended and has every report.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    back: list[threading.Timer] = []

    def go_away(report: Report) -> None:
        if report.step == 8 and not back:
            mlflow_server.stop()
            back.append(threading.Timer(AWAY_S, mlflow_server.start))
            back[0].start()

    disturbed = run_search(finished.job_file, go_away)
    back[0].join()
    assert close(disturbed.document["trials"], finished.document["trials"])
    assert {"name": "tiny", "version": 1, "alias": "champion"}.items() <= disturbed.document[
        "model"
    ].items()
    assert not find_search("latest").unwritten.exists()
    client = mlflow.MlflowClient(mlflow_server.uri)
    runs = search_runs(mlflow_server.uri)
    assert [run.info.status for run in runs] == ["FINISHED"] * 9
    logged = {
        run.data.tags["orchestrator.trial"]: [
            point.step for point in client.get_metric_history(run.info.run_id, "validation_loss")
        ]
        for run in runs
        if "orchestrator.trial" in run.data.tags
    }
    assert logged == {
        trial: [one.step for one in reports] for trial, reports in disturbed.reports.items()
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that holds only a few kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"file systems can't be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_costs_the_state_alone(
    small_disk: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is reported once; the search ends as usual and registers its version.

    MLflow is on another disk.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(small_disk))
    filler = small_disk / "filler"

    def fill(report: Report) -> None:
        if report.step == 8 and not filler.exists():
            free = os.statvfs(small_disk)
            filler.write_bytes(b"\0" * (free.f_bavail * free.f_frsize))

    disturbed = run_search(write_job(tmp_path, search__scheduler="fifo", search__trials=4), fill)
    assert (
        disturbed.said.count("the search's state can't be written (No space left on device)") == 1
    )
    assert disturbed.said.count("the result can't be kept") == 1
    assert [trial["steps"] for trial in disturbed.document["trials"]] == [16] * 4
    assert {"name": "tiny", "version": 1, "alias": "champion"}.items() <= disturbed.document[
        "model"
    ].items()


def test_a_lost_machine_whose_searches_are_in_a_store(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine goes on from the copy in an object store when the first one is lost.

    The result is that of an undisturbed search.
    """
    if reason := why_no_object_store():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    train = {"steps": 2000, "batch_size": 4, "evaluate_every": 50}
    job = write_job(tmp_path, train=train, search__trials=4, search__scheduler="fifo")
    whole = run_search(job).document
    with object_store("team") as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.pop("MLFLOW_S3_ENDPOINT_URL"))
        for name, value in store.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ORCHESTRATOR_HOME", "s3://team/searches")
        monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "lost"))
        driver = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "run", str(job)],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        home = RemoteHome("s3://team/searches")
        try:
            eventually(
                lambda: any(
                    b"reported" in (home.read(Path(it), JOURNAL) or b"") for it in home.ids()
                )
            )
        finally:
            driver.kill()
            driver.wait()
        shutil.rmtree(tmp_path / "lost")
        monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "elsewhere"))
        search = find_search("latest")
        assert 0 < len(read_history(search).reports) < 4 * 2000 / 50
        document, _ = resume_search("latest", Recorder)
        assert home.read(search.path, "result.json") == search.result.read_bytes()
    for name in ("status", "trials", "best", "baselines"):
        assert close(document[name], whole[name]), name
