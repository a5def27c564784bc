"""The Ray Train worker: loads and freezes the backbone once, then trains whatever trials the broker seats. The only
importer of ray.train."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import JobFailed, OrchestratorError
from orchestrator.search.broker import Place
from orchestrator.search.placement import Placement
from orchestrator.spec import JobSpec

RESTARTS = 3  # of a worker that dies; its trials go on from their newest checkpoints


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told: plain values and object references only."""

    name: str
    job: JobSpec
    placement: Placement
    broker: Any  # actor handle
    task: Any  # object reference of a tuning.engine.Task


def train_loop(config: dict[str, Any]) -> None:
    """Runs in the worker process until the broker says stop."""
    told: WorkerConfig = config["worker"]
    try:
        engine = load_engine(told)
    except Exception as error:  # whatever it is, it would be the same in a new process
        ray.get(told.broker.fail.remote(load_failure(told.job.base_model.id, error)))
        return
    backbone = engine.backbone
    digest = backbone.digest()
    try:
        place = Place(ray.get_runtime_context().get_node_id(), ray.util.get_current_placement_group())
        ray.get(told.broker.join.remote(told.name, engine.capacity, backbone.info, place))
        serve_orders(engine, told)
    except ray.exceptions.RayActorError:
        return  # the broker is gone, and with it the search: whoever goes on with it starts workers of its own
    if backbone.digest() != digest:
        raise RuntimeError("the backbone changed during the search; its results are void")


def load_engine(told: WorkerConfig) -> Any:
    from orchestrator.backbone import default_device, load_backbone, set_threads
    from orchestrator.base_model import resolve_model
    from orchestrator.tuning.engine import Engine

    set_threads(told.placement.threads)
    backbone = load_backbone(resolve_model(told.job.base_model), default_device(), told.job.base_model.dtype)
    return Engine(backbone, ray.get(told.task), told.job.train, told.job.search, told.placement.trials_per_worker)


def load_failure(model: str, error: Exception) -> JobFailed:
    if isinstance(error, OrchestratorError):
        return JobFailed(error.message, error.hint)
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    return JobFailed(
        f"the worker can't load base_model.id {model!r}: {type(error).__name__}: {reason}",
        "check that the model's files are whole and that its weights fit into memory",
    )


def serve_orders(engine: Any, told: WorkerConfig) -> None:
    """Fetch orders, carry them out, bring back what came of them."""
    reports: list[Any] = []
    evaluated: list[tuple[int, dict[str, float]]] = []
    while True:
        orders = ray.get(told.broker.next_orders.remote(told.name, reports, evaluated))
        if orders.stop:
            return
        for trial in orders.free:
            engine.free(trial)
        for seat in orders.seat:
            engine.seat(seat.trial, seat.spec, seat.checkpoint)
        evaluated = [(number, engine.evaluate(job)) for number, job in orders.evaluate]
        reports = [] if orders.evaluate else engine.round()


class TellBroker(UserCallback):
    """Runs beside Train's controller: the broker hears at once that a worker was lost, so that its trials go on
    elsewhere while Train looks for room to start it again."""

    def __init__(self, worker: str, broker: Any) -> None:
        self._worker = worker
        self._broker = broker

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._broker.leave.remote(self._worker, ray.get_runtime_context().current_actor)


class WorkerGroup(threading.Thread):
    """One TorchTrainer, run in a thread of the driver. ``error`` is what ended it, if anything went wrong."""

    def __init__(self, config: WorkerConfig, storage: Path, on_error: Any) -> None:
        super().__init__(name=f"worker-group-{config.name}", daemon=True)
        self.worker = config.name
        self.error: Exception | None = None
        self._on_error = on_error
        self._trainer = TorchTrainer(
            train_loop,
            train_loop_config={"worker": config},
            scaling_config=ScalingConfig(
                num_workers=1,
                use_gpu=config.placement.gpus > 0,
                resources_per_worker=config.placement.worker_resources(),
            ),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name=f"worker-{config.name}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=RESTARTS),
                callbacks=[TellBroker(config.name, config.broker)],
            ),
        )

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # Train wraps whatever happened in a worker in its own types
            self.error = error
            self._on_error(error)
