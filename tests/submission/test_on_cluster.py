"""The cluster's side of a submitted job, run in this process on the session's Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_jobs import Command, Recorder, close, search_runs, small_job

from orchestrator.cluster.submit import LABELS, SEARCH
from orchestrator.cluster.submit.outcome import result_in
from orchestrator.cluster.submit.package import pack
from orchestrator.search.submitted import carry_out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpack a job into the working directory and set the environment of an attempt."""
    (tmp_path / "source").mkdir()
    job = small_job(
        tmp_path / "source",
        search__trials=2,
        train={"steps": 4, "batch_size": 4, "evaluate_every": 4},
    )
    folder = tmp_path / "package"
    pack(job).write(folder)
    shutil.rmtree(tmp_path / "source")
    monkeypatch.setenv(SEARCH, "tiny-0123456789ab")
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(LABELS, '{"user": "ada", "project": "p"}')
    monkeypatch.chdir(folder)
    return folder


def test_an_error_is_left_for_the_submitter(package: Path, command: Command) -> None:
    """An error is printed as a line for the submitter, with the exit code of run."""
    (package / "inputs" / "data-path-train.jsonl").write_text("{")
    said = command("on-cluster")
    error = result_in(said.out)["error"]
    assert said.code == error["exit_code"] == 2 and "can't be read as JSON" in error["message"]
    assert "bad input: " in said.err


@pytest.mark.long
def test_a_search_is_kept_where_the_next_attempt_finds_it(
    package: Path,
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    """A search and its inputs are kept under the submission's name.

    Another attempt needs nothing of the first one's package. The MLflow runs have the submission's
    labels.
    """
    document, job = carry_out(Recorder)
    assert document["search"] == "tiny-0123456789ab"
    folder = tmp_path / "home" / "searches" / "tiny-0123456789ab"
    assert str(folder / "inputs") in str(job.data.path) and (folder / "result.json").is_file()
    for run in search_runs(f"sqlite:///{tmp_path}/home/mlflow.db"):
        assert run.data.tags["orchestrator.label.user"] == "ada"
        assert run.data.tags["orchestrator.label.project"] == "p"

    for child in package.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    (folder / "result.json").unlink()  # as if the driver had died just before its end
    monkeypatch.chdir(package)
    said = command("on-cluster")
    assert (
        said.code == 0
        and "going on with search tiny-0123456789ab: 2 of 2 trials are over" in said.err
    )
    again = result_in(said.out)
    assert close(again["trials"], [{**trial, "workers": found["workers"]} for trial, found in zip(
        document["trials"], again["trials"], strict=True)])  # fmt: skip
    assert again["summary"][0].startswith("search tiny-0123456789ab: 2 trials")


@pytest.mark.long
def test_a_store_keeps_it_for_a_node_that_has_nothing(
    package: Path,
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    """A second attempt goes on from the store, on a node with none of the first one's files."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", (tmp_path / "store").as_uri())
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    document, _ = carry_out(Recorder)
    (tmp_path / "store" / "searches" / document["search"] / "result.json").unlink()
    for child in package.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    monkeypatch.chdir(package)
    shutil.rmtree(tmp_path / "cache")
    said = command("on-cluster")
    assert said.code == 0 and "2 of 2 trials are over" in said.err
    assert result_in(said.out)["best"]["metrics"] == document["best"]["metrics"]


def test_it_is_no_verb_for_people(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """on-cluster is not in the help and is refused outside a job."""
    monkeypatch.delenv(SEARCH, raising=False)
    said = command("on-cluster")
    assert said.code == 2 and "orchestrator submit" in said.err
    assert "on-cluster" not in command("--help").out
