"""``orchestrator init`` writes files that are accepted unchanged and overwrites nothing."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from small_jobs import Command

from orchestrator.cli.init import STARTER, starter_file
from orchestrator.job.yaml import load_job

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_empty_folder_becomes_a_job_that_validate_accepts(command: Command) -> None:
    """The next step that `init` prints works, without a jobs/ folder."""
    said = command("init")
    assert said.code == 0, said.err
    assert (
        said.out.splitlines()[-1]
        == "next: orchestrator validate job.yaml && orchestrator run job.yaml"
    )
    checked = command("validate", "job.yaml")
    assert checked.code == 0 and "sound" in checked.out


@pytest.mark.ray  # its own
def test_an_empty_folder_becomes_a_job_that_runs(empty_folder: Path) -> None:
    """`init`, `validate` and `run`, each a separate program, end with a champion."""
    store = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{empty_folder}/mlflow.db",
        "ORCHESTRATOR_HOME": str(empty_folder / "home"),
    }
    for arguments in (["init"], ["validate", "job.yaml"], ["run", "job.yaml", "--quiet"]):
        ran = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **store},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ran.returncode == 0, f"{arguments}: {ran.stdout}{ran.stderr}"
    assert "registered my-search version 1, alias champion" in ran.stdout


def test_the_folder_is_made_and_named_in_the_next_step(command: Command) -> None:
    """The folder's name is quoted for the shell if needed; JSON has the same steps."""
    said = command("init", "my jobs/first")
    assert said.out.splitlines()[-1].startswith(
        "next: cd 'my jobs/first' && orchestrator validate job.yaml"
    )
    document = command("init", "second", "--json").document
    assert document["files"] == [str(Path("second", name).absolute()) for name in STARTER]
    assert document["next"] == [
        "cd second",
        "orchestrator validate job.yaml",
        "orchestrator run job.yaml",
    ]


@pytest.mark.parametrize("name", STARTER)
def test_a_file_that_is_there_stays_as_it_is(
    name: str, command: Command, empty_folder: Path
) -> None:
    """The error names the existing file, nothing else is written, and the exit code is 2."""
    Path(name).write_text("mine")
    said = command("init")
    assert (
        said.code == 2
        and f"{name} exists already" in said.err
        and "orchestrator init DIR" in said.err
    )
    assert Path(name).read_text() == "mine"
    assert [file.name for file in empty_folder.iterdir()] == [name]


def test_both_files_are_named(command: Command) -> None:
    """A second `init` in the same folder changes nothing."""
    command("init")
    said = command("init")
    assert said.code == 2 and "job.yaml and train.csv exist already" in said.err


def test_a_link_to_nowhere_is_a_file_that_is_there(command: Command) -> None:
    """A dangling link counts as existing: writing through it would create a file elsewhere."""
    Path("job.yaml").symlink_to("elsewhere.yaml")
    assert command("init").code == 2
    assert not Path("elsewhere.yaml").exists() and not Path("train.csv").exists()


def test_a_file_in_place_of_the_folder_is_refused(command: Command) -> None:
    """A file in place of the folder, or of one of its parents, is refused."""
    Path("file").write_text("")
    for folder in ("file", "file/below"):
        said = command("init", folder)
        assert said.code == 2 and folder in said.err and "orchestrator init DIR" in said.err


def test_the_rows_are_enough_for_every_split() -> None:
    """Both labels have equally many rows, no text repeats, and the verbalizer has every label."""
    rows = list(csv.DictReader(starter_file("train.csv").decode().splitlines()))
    labels = Counter(row["label"] for row in rows)
    assert labels == {"positive": 50, "negative": 50}
    assert len({row["text"] for row in rows}) == len(rows)


def test_the_demo_runs_the_quickstart_of_the_jobs_folder(tmp_path: Path) -> None:
    """The package's copy of the quickstart equals the one in jobs/."""
    file = tmp_path / "quickstart.yaml"
    file.write_bytes(starter_file("quickstart.yaml"))
    assert load_job(file) == load_job(ROOT / "jobs" / "quickstart.yaml")
