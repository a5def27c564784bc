"""The Ray Train worker, which loads and freezes the backbone once and trains the broker's trials.

The workers of a group do the same work in step. The first worker talks to the broker for all of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypedDict, TypeVar

import ray

from orchestrator.cluster import actors
from orchestrator.cluster.actors import Reference
from orchestrator.errors import BadInput, JobFailed, OrchestratorError
from orchestrator.job.metrics import MetricFailed
from orchestrator.job.spec import JobSpec
from orchestrator.search.workers.broker import BrokerHandle, Orders, Place
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.watch import ReadingSender
from orchestrator.tuning.meter import TellingMeter
from orchestrator.tuning.reports import Report
from orchestrator.utils.text import first_line

if TYPE_CHECKING:  # the driver and Train's controller import this module without torch
    from orchestrator.models.backbone import Backbone
    from orchestrator.search.workers.model_files import ModelFilesHandle
    from orchestrator.tuning.engine import Engine, Task
    from orchestrator.tuning.mixed import MixedEngine
    from orchestrator.tuning.worker_group import Group

T = TypeVar("T")
AnyEngine: TypeAlias = "Engine | MixedEngine"


@dataclass(frozen=True)
class WorkerConfig:
    """The settings of a worker: plain values and Ray references only."""

    name: str
    job: JobSpec
    placement: Placement
    broker: BrokerHandle
    task: Reference[Task]
    files: ModelFilesHandle | None = None
    """The base model's files, if a node may lack them."""


class LoopConfig(TypedDict):
    """The argument that Ray Train passes to ``train_loop``."""

    worker: WorkerConfig


def train_loop(config: LoopConfig) -> None:
    """Serve the broker in the worker process until it says stop.

    Raises RuntimeError if the backbone's weights changed during the search.
    """
    told = config["worker"]
    told.broker.start.remote()
    engine = load_engine(told)
    if engine is None:
        return
    backbone = engine.backbone
    digest = backbone.digest()
    if engine.group.leads:
        engine.meter = TellingMeter(ReadingSender(told.name, told.broker))
        join(engine, told)
    serve_orders(engine, told)
    if backbone.digest() != digest:
        raise RuntimeError("the backbone changed during the search; its results are void")


def load_engine(told: WorkerConfig) -> AnyEngine | None:
    """Load the backbone and make the engine on it.

    Returns None if a worker of the group failed to load; the broker then has the reason.
    """
    from orchestrator.models.backbone import check_exact, device_for, read_backbone, set_threads
    from orchestrator.search.workers.model_files import model_source
    from orchestrator.tuning.make import make_engines
    from orchestrator.tuning.worker_group import joined_group

    set_threads(told.placement.threads)
    job, device = told.job, device_for(told.placement.gpus)
    resources = job.resources
    sharded = resources.sharding == "fsdp"
    group = joined_group(device, in_step=sharded)

    def read() -> Backbone:
        # Ray counts a machine's accelerators, but torch may be unable to use them. A job with
        # gpus_per_worker auto then trains on the CPU, and the driver warns of it.
        device_for(
            told.placement.gpus,
            "" if resources.gpus_per_worker == "auto" else "resources.gpus_per_worker",
        )
        announce = group.agree if sharded else None
        return read_backbone(
            model_source(job.base_model, told.files), device, job.base_model.dtype, announce
        )

    def engine_of(backbone: Backbone) -> AnyEngine:
        check_exact(backbone)
        slots, cores = told.placement.trials_per_worker, told.placement.threads
        return make_engines(
            backbone, actors.get(told.task), job.train, job.search, slots, group, cores
        )

    backbone = _by_all(group, told, read)
    return None if backbone is None else _by_all(group, told, partial(engine_of, backbone))


def _by_all(group: Group, told: WorkerConfig, work: Callable[[], T]) -> T | None:
    """Do ``work`` on every worker of the group and return its result.

    Returns None on every worker if one of them failed, since the next step needs all of them. The
    broker gets the first failure.
    """
    made, failure = None, None
    try:
        made = work()
    except Exception as error:  # a new process would fail in the same way
        failure = load_failure(told.job.base_model.id, error)
    failures = [one for one in group.gathered(failure) if one is not None]
    if not failures:
        return made
    actors.get(told.broker.fail.remote(failures[0]))
    return None


def load_failure(model: str, error: Exception) -> OrchestratorError:
    """Make the error that the driver raises for a worker that failed to load.

    BadInput stays BadInput: a model that can't be used is bad input wherever that is found out.
    """
    if isinstance(error, BadInput):
        return BadInput(error.message, error.hint)
    if isinstance(error, OrchestratorError):
        return JobFailed(error.message, error.hint)
    return JobFailed(
        f"the worker can't load base_model.id {model!r}: {first_line(error, with_type=True)}",
        "check that the model's files are whole and that its weights fit into memory",
    )


def serve_orders(engine: AnyEngine, told: WorkerConfig) -> None:
    """Fetch orders from the broker, carry them out, and return their results with the next call.

    In a group, the first worker fetches the orders for all.
    """
    reports: list[Report] = []
    evaluated: list[tuple[int, dict[str, float]]] = []
    while True:
        orders = engine.group.led(partial(next_orders, told, reports, evaluated))
        if orders.stop:
            return
        for trial in orders.free:
            engine.free(trial)
        for seat in orders.seat:
            engine.seat(seat.trial, seat.spec, seat.checkpoint)
        try:
            evaluated = [(number, engine.evaluate(job)) for number, job in orders.evaluate]
            reports = [] if orders.evaluate else engine.round()
        except MetricFailed as failure:  # a new process would fail in the same way
            ray.get(told.broker.fail.remote(failure))
            return


def join(engine: AnyEngine, told: WorkerConfig) -> None:
    """Register this worker and its free slots with the broker."""
    context = ray.get_runtime_context()
    place = Place(
        context.get_node_id(), ray.util.get_current_placement_group(), engine.backbone.device.type
    )
    with suppress(ray.exceptions.RayActorError):  # next_orders handles a broker that is gone
        actors.get(told.broker.join.remote(told.name, engine.capacity, engine.backbone.info, place))


def next_orders(
    told: WorkerConfig, reports: list[Report], evaluated: list[tuple[int, dict[str, float]]]
) -> Orders:
    """Bring results to the broker and return its next orders; stop if the broker is gone."""
    try:
        return actors.get(told.broker.next_orders.remote(told.name, reports, evaluated))
    except ray.exceptions.RayActorError:
        return Orders(stop=True)  # a search that is resumed starts workers of its own
