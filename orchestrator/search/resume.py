"""Resumption of an interrupted search from the contents of its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from orchestrator.cluster.ray_folder import ray_temp_note
from orchestrator.cluster.session import ray_session
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry
from orchestrator.search.prepare import prepare
from orchestrator.search.run import (
    Clock,
    Pipeline,
    Progress,
    check_search_end,
    find_artifacts,
    going_on,
    note_warnings,
)
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.journal import read_history
from orchestrator.search.state.processes import end_processes
from orchestrator.search.state.saved import SavedSearch, find_search, load_saved
from orchestrator.search.workers.running import placed
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import mask_secrets


def resume_search(
    wanted: str,
    progress_for: Callable[[JobSpec], Progress],
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
        with going_on(folder):
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
    registry = Registry()
    registry.check()
    if registry.display_uri != mask_secrets(saved.tracking_uri):
        raise BadInput(
            f"search {folder.id} logs to {saved.tracking_uri}, "
            f"and MLflow's address is now {registry.display_uri}",
            f"MLFLOW_TRACKING_URI={saved.tracking_uri} orchestrator resume {folder.id}",
        )
    check_search_end(job, registry)
    progress.stage("reading data and base model")
    history = read_history(folder)
    for trial in history.lost:
        progress.note(f"{trial} begins again: its checkpoint can't be read")
    artifacts, _ = find_artifacts(job, registry, saved.pins)
    prepared = prepare(job, artifacts, begun=True)
    saved.check(folder, prepared)
    note_warnings(prepared, progress)
    clock.mark("model", until=clock.last + prepared.making_s)
    clock.mark("prepare")
    end_processes(folder.processes)
    shutil.rmtree(folder.ray, ignore_errors=True)
    progress.stage("starting Ray")
    with ray_session(address, verbose) as ours:
        if ours and (note := ray_temp_note()):
            progress.note(note)
        clock.mark("ray")
        ended = len(history.ended)
        progress.note(
            f"going on with search {folder.id}: {ended} of {len(prepared.trials)} trials are over"
        )
        return Pipeline(
            prepared, registry, progress, clock, folder, saved.pins, saved, history
        ).run(placed(prepared), ours)
