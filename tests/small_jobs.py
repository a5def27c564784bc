"""Small job specs on a tiny random model and generated rows; a search takes seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.entities import Run
from models import model_folder, text_rows
from ray_state import eventually, holders
from rich.console import Console

from orchestrator.cli.progress import ConsoleProgress
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.search.run import run_job
from orchestrator.tuning.reports import Report

SPLITS = {"train": (40, 1), "validation": (16, 2), "test": (16, 3)}


def write_rows(folder: Path, sizes: Mapping[str, tuple[int, int]] = SPLITS) -> dict[str, str]:
    """Write one JSON lines file per split; return the value of data.path."""
    files = {}
    for split, (count, seed) in sizes.items():
        file = folder / f"{split}.jsonl"
        rows = ({**row, "label": int(len(row["text"]) > 12)} for row in text_rows(count, seed))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return files


def job_document(folder: Path) -> dict[str, Any]:
    """Return a job of eight ASHA trials as a YAML document; write its rows into the folder."""
    return {
        "name": "tiny",
        "base_model": {"id": str(model_folder())},
        "data": {
            "path": write_rows(folder),
            "template": "{text}\nspam?",
            "target": "label",
            "verbalizer": {0: " a quick no", 1: " yes"},
            "max_input_tokens": 60,
        },
        "search": {
            "space": {
                "init": ["random", "sample_vocab", "class_labels", {"text": "the quick brown fox"}],
                "num_virtual_tokens": [2, 5],
                "learning_rate": {"loguniform": [0.01, 1.0]},
                "seed": [0, 1],
            },
            "trials": 8,
            "metric": "loss",
        },
        "train": {"steps": 16, "batch_size": 4, "evaluate_every": 4},
        # One core per worker leaves room for other tests' actors in the session's Ray.
        "resources": {"cpus_per_worker": 1},
    }


def write_job(folder: Path, **changes: Any) -> Path:
    """Write the job to a file; keys of ``changes`` are dotted keys with __ for the dot."""
    document = job_document(folder)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return file


def small_job(folder: Path, **changes: Any) -> JobSpec:
    return load_job(write_job(folder, **changes))


def close(one: Any, other: Any) -> bool:
    """Compare nested lists and mappings, with a tolerance for floats."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == pytest.approx(other, rel=1e-4) if isinstance(one, float) else one == other)


@dataclass(frozen=True)
class Said:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which must be a single JSON document."""
        return json.loads(self.out)


Command = Callable[..., Said]


@dataclass(frozen=True)
class Finished:
    """A finished search: its document, its progress output, and its files."""

    folder: Path
    job_file: Path
    job: JobSpec
    document: dict[str, Any]
    reports: dict[str, list[Report]]
    said: str
    left_behind: set[str]  # actors and placement groups

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"


class Recorder(ConsoleProgress):
    """Progress that keeps every report; ``on_report`` is called with each."""

    def __init__(self, job: JobSpec, on_report: Callable[[Report], None] | None = None) -> None:
        self.said = io.StringIO()
        self.reports: dict[str, list[Report]] = {}
        self._on_report = on_report
        super().__init__(job, Console(file=self.said, width=200))

    def trial_reported(self, trial: str, report: Report) -> None:
        super().trial_reported(trial, report)
        self.reports.setdefault(trial, []).append(report)
        if self._on_report is not None:
            self._on_report(report)


def run_search(job_file: Path, on_report: Callable[[Report], None] | None = None) -> Finished:
    """Run the job in the working directory, on the session's Ray."""
    job = load_job(job_file)
    progress = Recorder(job, on_report)
    before = holders()
    document = run_job(job, progress)
    eventually(lambda: holders() <= before)
    left = holders() - before
    return Finished(
        Path.cwd(), job_file, job, document, progress.reports, progress.said.getvalue(), left
    )


def search_runs(uri: str) -> list[Run]:
    """Return the parent and child runs of searches in an MLflow store.

    Runs that keep the history of aliases are left out.
    """
    client = mlflow.MlflowClient(uri)
    found = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    return [run for run in found if "orchestrator.state" in run.data.tags]
