"""A group of workers under one trainer of Ray Train.

Only this module and ``ray_internals.train`` import ray.train. Train's controller imports this file
before it starts a worker. For that reason nothing here imports torch: only the controller of a
group of several workers needs torch, to set up their process group.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from orchestrator.cluster.ray_internals.train import GivenUp, LeanTrainer
from orchestrator.cluster.ray_threads import RayThread
from orchestrator.cluster.session import started_here
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.worker import WorkerConfig, train_loop

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

    from orchestrator.search.workers.broker import BrokerHandle

RESTARTS = 3  # of a worker that dies; its trials go on from their newest checkpoints


class TellBroker(UserCallback):
    """A callback in Train's controller that tells the broker at once that a worker was lost.

    The worker's trials then go on elsewhere while Train looks for room to start the worker again.
    """

    def __init__(self, worker: str, broker: BrokerHandle) -> None:
        self._worker = worker
        self._broker = broker

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]
    ) -> None:
        self._broker.leave.remote(self._worker, ray.get_runtime_context().current_actor)


def backend(placement: Placement) -> BackendConfig:
    """Choose how the workers of a group communicate: a single worker needs nothing.

    Several workers form a process group of torch, with NCCL between accelerators and Gloo between
    CPUs. The timeout is ``PATIENCE``, because a group may wait for its orders for long.
    """
    if placement.workers_per_group == 1:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    from orchestrator.tuning.worker_group import PATIENCE

    return TorchConfig(
        backend="nccl" if placement.gpus else "gloo", timeout_s=int(PATIENCE.total_seconds())
    )


class WorkerGroup(RayThread):
    """A thread of the driver that runs a trainer; ``error`` is the error that ended it, if any."""

    def __init__(
        self, config: WorkerConfig, storage: Path, on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__(f"worker-group-{config.name}")
        self.worker = config.name
        self.error: Exception | None = None
        self._on_error = on_error
        self._trainer = LeanTrainer(
            train_loop,
            plain=started_here(),
            train_loop_config={"worker": config},
            scaling_config=ScalingConfig(
                num_workers=config.placement.workers_per_group,
                use_gpu=config.placement.gpus > 0,
                resources_per_worker=config.placement.worker_resources(),
            ),
            backend_config=backend(config.placement),
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
        except GivenUp:
            return
        except Exception as error:  # Train wraps a worker's errors in its own types
            self.error = error
            self._on_error(error)

    def abort(self) -> None:
        """End the workers and the thread through Train's controller."""
        self._trainer.abort()

    def kill(self) -> None:
        """Kill the controller if ``abort`` did not end the workers and the thread."""
        self._trainer.kill()
