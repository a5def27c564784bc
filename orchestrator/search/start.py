"""Start a search: open its MLflow run, its workers and its journal, and close them at the end."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from orchestrator.errors import BadInput
from orchestrator.job.space import why_fewer_trials
from orchestrator.registry import SearchLog
from orchestrator.search.context import SearchContext, StartedSearch
from orchestrator.search.mlflow_tags import search_tags
from orchestrator.search.prepare import data_record
from orchestrator.search.state.journal import Journal
from orchestrator.search.state.processes import save_processes
from orchestrator.search.state.recorder import Recorder
from orchestrator.search.state.saved import SavedSearch, refuse_changes
from orchestrator.search.tracking import BASE_MODEL, MlflowMirror
from orchestrator.search.workers.running import Running, running
from orchestrator.utils.interrupts import whole


@contextmanager
def started(context: SearchContext) -> Iterator[StartedSearch]:
    """Open everything that the trials and baselines need.

    The MLflow run is opened first, so that MLflow refuses before any worker is started. It is
    closed before the workers are stopped, since stopping them takes longer than the grace period of
    SIGTERM; the outer context closes it if no worker can start.

    Raises BadInput when the base model is not the one that a resumed search began with.
    """
    open_log = partial(open_mlflow_run, context)
    workers = partial(running, context.prepared, context.placement, context.folder.ray)
    with whole(open_log) as log, whole(workers) as search_workers, whole(lambda: log):
        check_base_model(context, search_workers, log)
        save_identity(context, log)
        with whole(partial(open_recorder, context, log)) as recorder:
            if context.local_ray:
                # Save them again: Ray starts its agents a little later.
                save_processes(context.folder.processes)
            show_start(context, log)
            yield StartedSearch(context, log, search_workers, recorder)


def open_mlflow_run(context: SearchContext) -> SearchLog:
    """Open the search's MLflow run: a new one, or the run of the search that is resumed."""
    job, registry, spill = context.job, context.registry, context.folder.unwritten
    params = {
        "method": ", ".join(job.methods),
        "base_model": job.base_model.id, "revision": job.base_model.revision,
        "template": job.data.template,
        "searcher": job.search.searcher, "scheduler": job.search.scheduler,
        "trials": context.prepared.total, "metric": job.search.metric, "steps": job.train.steps,
        "batch_size": job.train.batch_size, "evaluate_every": job.train.evaluate_every,
        "optimizer": job.train.optimizer, "space": job.search.space.model_dump(),
        "train": job.train.model_dump(),
    }  # fmt: skip
    if context.saved is not None:
        return registry.resume_search(context.saved.run_id, params=params, spill=spill)
    tags = {**search_tags(context.prepared, context.id), "python": platform.python_version()}
    data = data_record(job.data, context.prepared.rows)
    return registry.start_search(job.name, params, tags, data=data, spill=spill)


def check_base_model(context: SearchContext, workers: Running, log: SearchLog) -> None:
    """Refuse to resume a search on other base model weights than it began with.

    Raises BadInput, and marks the search's MLflow run as killed.
    """
    known = context.history.found(BASE_MODEL)
    if known is None:
        return
    same_weights = workers.ready().fingerprint == known.value
    try:
        refuse_changes(context.folder, [] if same_weights else ["the base model's weights"])
    except BadInput:
        log.finish("KILLED")
        raise


def save_identity(context: SearchContext, log: SearchLog) -> None:
    """Save what a later process needs to resume a new search."""
    if context.saved is None:
        identity = SavedSearch.of(
            context.prepared, context.pins, context.registry.display_uri, log.run_id
        )
        identity.save(context.folder, context.job)


def open_recorder(context: SearchContext, log: SearchLog) -> Recorder:
    """Open the recorder of the search's events, once MLflow has the events of earlier attempts."""
    job, history = context.job, context.history
    copies_trials = job.search.scheduler == "pbt"
    mirror = MlflowMirror(log, copies_trials, search_tags(context.prepared, context.id))
    mirror.restore(history)
    journal = Journal(context.folder, history, job.perturbation_steps if copies_trials else None)
    return Recorder(journal, history, mirror.write, context.progress.note)


def show_start(context: SearchContext, log: SearchLog) -> None:
    """Tell the user and MLflow what is known before the trials start."""
    progress, plan = context.progress, context.plan
    if plan:
        progress.note(f"planned: about {plan.seconds['total']:.0f} s in all")
        log.parent_metrics(plan.metrics())
        log.parent_tags({"orchestrator.plan.warnings": "; ".join(plan.warnings)})
    if context.prepared.warnings:
        log.parent_tags({"orchestrator.warnings": " ".join(context.prepared.warnings)})
    if reason := why_fewer_trials(context.job.search):
        progress.note(f"fewer trials than requested: {reason}")
    progress.stage("loading the base model into the worker")
