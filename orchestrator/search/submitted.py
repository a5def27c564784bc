"""The cluster's side of a submitted job: the search that it is an attempt at, begun or gone on with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cluster.submit import SEARCH, unpacked
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.search.resume import resume_search
from orchestrator.search.run import Progress, run_job
from orchestrator.search.state.folder import SearchFolder, home_folder, searches_folder
from orchestrator.utils.atomic import write_whole

HOME = Path(
    "~/.orchestrator"
)  # where a driver without ORCHESTRATOR_HOME keeps searches, and runs without an MLflow


def carry_out(progress_for: Callable[[JobSpec], Progress]) -> tuple[dict[str, Any], JobSpec]:
    """Run the job that was unpacked into the working directory, or go on with its search; returns the document of
    ``run --json``, and the job.

    Raises as ``run_job`` and ``resume_search``.
    """
    package, name = Path.cwd(), os.environ.get(SEARCH)
    if not name:
        raise BadInput(
            "on-cluster is what a submitted job runs", "orchestrator submit JOB --address URL"
        )
    os.environ.setdefault("ORCHESTRATOR_HOME", str(HOME.expanduser()))
    home = home_folder()
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)  # the package's folder goes with the job
    folder = SearchFolder(searches_folder() / name)
    folder.fetch()
    if folder.description.is_file():
        return resume_search(str(folder.path), progress_for)
    job = _placed(package, folder)
    progress = progress_for(job)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        progress.note(
            f"MLFLOW_TRACKING_URI is not set: runs and models go to {home / 'mlflow.db'} on this node"
        )
    return run_job(job, progress, folder=folder), job


def _placed(package: Path, folder: SearchFolder) -> JobSpec:
    """The job, with the files that came along copied into the search's folder, where a later attempt finds them."""
    inputs = folder.path / "inputs"
    text, copies = unpacked(package, inputs)
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_whole(folder.path / "submitted.yaml", text.encode())
    return load_job(folder.path / "submitted.yaml")
