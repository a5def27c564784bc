"""Resumption of an interrupted search from the contents of its folder."""

from __future__ import annotations

import json
import shutil

from orchestrator.cluster.session import ray_session
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry
from orchestrator.search.context import SearchContext
from orchestrator.search.prepare import check_registration, prepare_job
from orchestrator.search.progress import Clock, Progress, ProgressFactory
from orchestrator.search.resume_hints import naming_resume
from orchestrator.search.run import run_search, show_warnings
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.journal import read_history
from orchestrator.search.state.processes import end_processes
from orchestrator.search.state.saved import SavedSearch, find_search, load_saved
from orchestrator.search.workers.running import place_search
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import mask_secrets


def resume_search(
    wanted: str,
    progress_for: ProgressFactory,
    address: str | None = None,
    verbose: bool = False,
) -> tuple[JsonObject, JobSpec]:
    """Resume the search that ``wanted`` names.

    Returns the document of ``run --json``, and the job. For a search that is finished, the stored
    document is returned and nothing is run. Raises BadInput for a search that does not exist, is
    still running, or began with other data or another base model, and the errors of ``run_job``.
    """
    folder = find_search(wanted)
    with folder.locked():
        saved, job = load_saved(folder)
        progress = progress_for(job)
        if folder.result.is_file():
            progress.note(f"search {folder.id} is finished; this is what it found")
            return json.loads(folder.result.read_bytes()), job
        with naming_resume(folder):
            return _go_on(folder, saved, job, progress, address, verbose), job


def _go_on(
    folder: SearchFolder,
    saved: SavedSearch,
    job: JobSpec,
    progress: Progress,
    address: str | None,
    verbose: bool,
) -> JsonObject:
    """Check that the inputs are those of the saved search, and run the remaining trials."""
    clock = Clock()
    registry = Registry.connect()
    if registry.display_uri != mask_secrets(saved.tracking_uri):
        raise BadInput(
            f"search {folder.id} logs to {saved.tracking_uri}, "
            f"and MLflow's address is now {registry.display_uri}",
            f"MLFLOW_TRACKING_URI={saved.tracking_uri} orchestrator resume {folder.id}",
        )
    check_registration(job, registry)
    progress.stage("reading data and base model")
    history = read_history(folder)
    for trial in history.lost:
        progress.note(f"{trial} begins again: its checkpoint can't be read")
    prepared, _ = prepare_job(job, registry, clock, pins=saved.pins, begun=True)
    saved.check(folder, prepared)
    show_warnings(prepared.warnings, progress)
    end_processes(folder.processes)
    shutil.rmtree(folder.ray, ignore_errors=True)
    progress.stage("starting Ray")
    with ray_session(address, verbose, job.resources.niceness) as local_ray:
        clock.mark("ray")
        ended = len(history.part(confirming=False).ended)
        progress.note(
            f"going on with search {folder.id}: {ended} of {prepared.total} trials are over"
        )
        context = SearchContext(
            prepared=prepared,
            pins=saved.pins,
            registry=registry,
            folder=folder,
            progress=progress,
            clock=clock,
            placement=place_search(prepared),
            local_ray=local_ray,
            saved=saved,
            history=history,
        )
        return run_search(context)
