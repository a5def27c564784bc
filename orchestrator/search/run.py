"""A tuning job from its spec to a registered prompt and a report.

``run_job`` begins a new search, and ``search.resume`` continues one. Both end in ``run_search``.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.ray_folder import ray_temp_note
from orchestrator.cluster.session import ray_beside
from orchestrator.errors import SearchLost
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry
from orchestrator.search.baselines import baselines_beside
from orchestrator.search.confirm import confirm_best
from orchestrator.search.context import SearchContext, StartedSearch
from orchestrator.search.inputs import Inputs, check_inputs
from orchestrator.search.plan.plan import make_plan
from orchestrator.search.prepare import check_registration, prepare_job
from orchestrator.search.progress import Clock, Progress
from orchestrator.search.report import read_facts, write_report
from orchestrator.search.result import Result, evaluate_best, publish_result
from orchestrator.search.resume_hints import naming_resume
from orchestrator.search.start import started
from orchestrator.search.state.folder import SearchFolder, check_home
from orchestrator.search.state.journal import read_history
from orchestrator.search.state.processes import save_processes
from orchestrator.search.state.saved import load_saved
from orchestrator.search.workers.prestart import make_ready
from orchestrator.search.workers.running import place_search
from orchestrator.search.workers.watch import watching
from orchestrator.utils.atomic import write_whole
from orchestrator.utils.interrupts import nothing_to_interrupt
from orchestrator.utils.text import first_line

RESTARTS = 3  # times that a search restarts after its broker or a Train controller was lost


def run_job(
    job: JobSpec,
    progress: Progress,
    address: str | None = None,
    verbose: bool = False,
    planned: bool = False,
    folder: SearchFolder | None = None,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Run the job and return the document of ``run --json``.

    ``planned`` measures the job first and keeps the estimate beside the outcome. ``folder`` is
    where the search is kept; a new folder is made unless one is given. ``inputs`` is the result of
    checking the job's files; they are checked here unless it is given.

    Raises OrchestratorError, and leaves nothing half-made behind. An interrupt raises Interrupted
    once there is a search that can be resumed.
    """
    inputs = inputs or check_inputs(job)  # first, since starting and stopping Ray takes seconds
    clock = Clock.after(inputs.seconds)
    registry = Registry()
    check_home()
    niceness = job.resources.niceness
    with ray_beside(address, verbose, then=make_ready, niceness=niceness) as ray_up:
        registry.check()
        check_registration(job, registry)
        progress.stage("reading data and base model")
        prepared, pins = prepare_job(job, registry, clock, rows=inputs.rows)
        show_warnings(prepared.warnings, progress)
        progress.stage("starting Ray")
        local_ray = ray_up()
        clock.mark("ray")
        if not local_ray and "niceness" in job.resources.model_fields_set:
            progress.note("resources.niceness has no effect on a Ray that is already running")
        placement = place_search(prepared)
        folder = folder or SearchFolder.new(job.name)
        context = SearchContext(
            prepared, pins, registry, folder, progress, clock, placement, local_ray
        )
        with folder.locked(), naming_resume(folder):
            if planned:
                measure_plan(context)
            return run_search(context)


def run_search(context: SearchContext) -> dict[str, Any]:
    """Run the search to its end and return the document of its result.

    It restarts from its journal when its broker or a Train controller is lost.
    """
    if context.local_ray:
        if note := ray_temp_note():
            context.progress.note(note)
        save_processes(context.folder.processes)
    for restarts_left in reversed(range(RESTARTS + 1)):
        try:
            document = attempt(context)
            break
        except SearchLost as error:
            if not restarts_left or not context.folder.description.is_file():
                raise
            context.progress.note(f"{error.message}; going on from what was kept")
            read_back(context)
    keep_document(context, document)
    context.folder.processes.unlink(missing_ok=True)
    draw_report(context)
    nothing_to_interrupt()
    return document


def attempt(context: SearchContext) -> dict[str, Any]:
    """Run the search from its current state until its result is registered.

    Raises NothingFound when no trial has a result, and SearchLost when the broker or a Train
    controller was lost.
    """
    with started(context) as search:
        with watching(search.workers.broker, context.progress.within):
            result = find_result(search)
        return publish_result(search, result)


def find_result(search: StartedSearch) -> Result:
    """Run the trials with the baselines beside them, and test the best ones."""
    context, workers = search.context, search.workers
    with baselines_beside(search) as baselines_ready:
        with context.progress.trials(context.trials, context.prepared.total, context.history):
            outcome = workers.study([search.recorder, context.progress], context.history)
            confirm_best(search, outcome)
        baselines = baselines_ready.result()
    search.recorder.flush()
    context.clock.mark("workers", until=baselines.loaded_at)
    context.clock.mark("trials")
    best_trials = evaluate_best(search, outcome)
    return Result(outcome, best_trials, baselines.metrics, workers.ready())


def show_warnings(warnings: tuple[str, ...], progress: Progress) -> None:
    """Show the warnings about what makes the result less trustworthy."""
    for warning in warnings:
        progress.note(f"warning: {warning}")


def measure_plan(context: SearchContext) -> None:
    """Estimate the search before it runs; the estimate is kept beside the outcome."""
    context.progress.stage("measuring the start, steps and evaluations")
    storage = context.folder.ray / "rehearsal"
    context.plan = make_plan(
        context.prepared, context.placement, nodes(), context.clock.before(), storage
    )
    context.clock.mark("plan")


def read_back(context: SearchContext) -> None:
    """Return to what the search's folder holds, for another attempt."""
    context.saved, _ = load_saved(context.folder)
    context.history = read_history(context.folder)
    shutil.rmtree(context.folder.ray, ignore_errors=True)


def keep_document(context: SearchContext, document: dict[str, Any]) -> None:
    """Write the result to the search's folder; a failure is only noted."""
    try:
        write_whole(context.folder.result, json.dumps(document, default=str).encode())
    except OSError as error:
        context.progress.note(
            f"the result can't be kept in {context.folder.result} ({error.strerror})"
        )


def draw_report(context: SearchContext) -> None:
    """Write the report to the search's folder and MLflow run.

    A report that fails is only noted, since the search's result is already safe.
    """
    context.progress.stage("drawing the report")
    try:
        write_report(read_facts(context.folder), context.folder.report, context.registry)
    except Exception as error:
        context.progress.note(
            f"no report: {first_line(error)}; again with orchestrator report {context.id}"
        )
