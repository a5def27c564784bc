"""The cluster's side of a submitted job: each attempt begins its search or resumes it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from orchestrator.cluster.submit import SEARCH, unpacked
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.search.progress import ProgressFactory
from orchestrator.search.resume import resume_search
from orchestrator.search.run import run_job
from orchestrator.search.state.folder import SearchFolder, home_folder, searches_folder
from orchestrator.utils.atomic import write_whole
from orchestrator.utils.documents import JsonObject

# The folder for searches if ORCHESTRATOR_HOME is not set, and for runs if there is no MLflow.
HOME = Path("~/.orchestrator")


def carry_out(progress_for: ProgressFactory) -> tuple[JsonObject, JobSpec]:
    """Run the job that was unpacked into the working directory, or resume its search.

    Returns the document of ``run --json``, and the job. Raises BadInput outside a submitted job,
    and the errors of ``run_job`` and ``resume_search``.
    """
    package, name = Path.cwd(), os.environ.get(SEARCH)
    if not name:
        raise BadInput(
            "on-cluster is what a submitted job runs", "orchestrator submit JOB --address URL"
        )
    os.environ.setdefault("ORCHESTRATOR_HOME", str(HOME.expanduser()))
    home = home_folder()
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)  # the package's folder does not outlive the job
    folder = SearchFolder(searches_folder() / name)
    folder.fetch()
    if folder.description.is_file():
        return resume_search(str(folder.path), progress_for)
    job = _unpacked_job(package, folder)
    progress = progress_for(job)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        progress.note(
            "MLFLOW_TRACKING_URI is not set: "
            f"runs and models go to {home / 'mlflow.db'} on this node"
        )
    return run_job(job, progress, folder=folder), job


def _unpacked_job(package: Path, folder: SearchFolder) -> JobSpec:
    """Load the job, and copy the files of its package into the search's folder.

    A later attempt finds the files there.
    """
    inputs = folder.path / "inputs"
    text, copies = unpacked(package, inputs)
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_whole(folder.path / "submitted.yaml", text.encode())
    return load_job(folder.path / "submitted.yaml")
