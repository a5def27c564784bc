"""The Ray Train worker: loads and freezes the backbone once, then trains whatever trials the broker seats.

The workers of a group do the same at the same time; the first of them talks to the broker for all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from orchestrator.errors import BadInput, JobFailed, OrchestratorError
from orchestrator.job.spec import JobSpec
from orchestrator.search.workers.broker import Orders, Place
from orchestrator.search.workers.placement import Placement
from orchestrator.utils.imports import uncollected


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told: plain values and object references only."""

    name: str
    job: JobSpec
    placement: Placement
    broker: Any  # actor handle
    task: Any  # object reference of a tuning.engine.Task
    files: Any = None  # actor handle of the base model's files, where a node may lack them


def train_loop(config: dict[str, Any]) -> None:
    """Runs in the worker process until the broker says stop."""
    told: WorkerConfig = config["worker"]
    told.broker.start.remote()
    engine = load_engine(told)
    if engine is None:
        return
    backbone = engine.backbone
    digest = backbone.digest()
    if engine.group.leads:
        join(engine, told)
    serve_orders(engine, told)
    if backbone.digest() != digest:
        raise RuntimeError("the backbone changed during the search; its results are void")


def load_engine(told: WorkerConfig) -> Any:
    """The engine on its backbone, or None once the broker knows why a worker of the group can't load it."""
    with uncollected():
        from orchestrator.models.backbone import check_exact, device_for, read_backbone, set_threads
        from orchestrator.search.workers.model_files import model_source
        from orchestrator.tuning.make import make_engine
        from orchestrator.tuning.worker_group import joined_group

    set_threads(told.placement.threads)
    job, device = told.job, device_for(told.placement.gpus)
    resources = job.resources
    sharded = resources.sharding == "fsdp"
    group = joined_group(device, in_step=sharded)

    def read() -> Any:
        # Ray counts a machine's accelerators; torch may lack what it takes to use them. A job that takes what there is
        # goes on, and the driver says so.
        device_for(
            told.placement.gpus,
            "" if resources.gpus_per_worker == "auto" else "resources.gpus_per_worker",
        )
        announce = group.agree if sharded else None
        return read_backbone(
            model_source(job.base_model, told.files), device, job.base_model.dtype, announce
        )

    def ready(backbone: Any) -> Any:
        check_exact(backbone)
        slots, cores = told.placement.trials_per_worker, told.placement.threads
        return make_engine(backbone, ray.get(told.task), job.train, job.search, slots, group, cores)

    backbone = _by_all(group, told, read)
    return None if backbone is None else _by_all(group, told, partial(ready, backbone))


def _by_all(group: Any, told: WorkerConfig, work: Callable[[], Any]) -> Any:
    """What ``work`` makes, or None on every worker where one of them failed: what comes next needs all of them."""
    made, failure = None, None
    try:
        made = work()
    except Exception as error:  # whatever it is, it would be the same in a new process
        failure = load_failure(told.job.base_model.id, error)
    failures = [one for one in group.gathered(failure) if one is not None]
    if not failures:
        return made
    ray.get(told.broker.fail.remote(failures[0]))
    return None


def load_failure(model: str, error: Exception) -> OrchestratorError:
    """Make the error that the driver raises. A model that can't be used is bad input wherever that comes to light."""
    if isinstance(error, BadInput):
        return BadInput(error.message, error.hint)
    if isinstance(error, OrchestratorError):
        return JobFailed(error.message, error.hint)
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    return JobFailed(
        f"the worker can't load base_model.id {model!r}: {type(error).__name__}: {reason}",
        "check that the model's files are whole and that its weights fit into memory",
    )


def serve_orders(engine: Any, told: WorkerConfig) -> None:
    """Fetch orders, carry them out, bring back what came of them. In a group the first worker does so for all."""
    reports: list[Any] = []
    evaluated: list[tuple[int, dict[str, float]]] = []
    while True:
        orders = engine.group.led(partial(next_orders, told, reports, evaluated))
        if orders.stop:
            return
        for trial in orders.free:
            engine.free(trial)
        for seat in orders.seat:
            engine.seat(seat.trial, seat.spec, seat.checkpoint)
        evaluated = [(number, engine.evaluate(job)) for number, job in orders.evaluate]
        reports = [] if orders.evaluate else engine.round()


def join(engine: Any, told: WorkerConfig) -> None:
    context = ray.get_runtime_context()
    place = Place(
        context.get_node_id(), ray.util.get_current_placement_group(), engine.backbone.device.type
    )
    with suppress(ray.exceptions.RayActorError):  # the next call sees to it
        ray.get(told.broker.join.remote(told.name, engine.capacity, engine.backbone.info, place))


def next_orders(
    told: WorkerConfig, reports: list[Any], evaluated: list[tuple[int, dict[str, float]]]
) -> Any:
    try:
        return ray.get(told.broker.next_orders.remote(told.name, reports, evaluated))
    except ray.exceptions.RayActorError:
        return Orders(
            stop=True
        )  # the broker is gone: whoever goes on with the search starts workers of its own
