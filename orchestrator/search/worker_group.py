"""A group of workers under one trainer of Ray Train. The only importer of ray.train.

Train starts processes that a search has no use for; each takes two seconds of a core, before or beside the worker's
own, which a search waits for. What they are is Ray's own business and may be called otherwise in another version: then
they start as ever.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.search.placement import Placement
from orchestrator.search.worker import WorkerConfig, train_loop
from orchestrator.tuning.group import PATIENCE

RESTARTS = 3  # of a worker that dies; its trials go on from their newest checkpoints
UNUSED = {
    "DatasetsCallback",  # hands out Ray Data's rows: ours go to the workers as one object
    "PlacementGroupCleanerCallback",  # after a controller that died: the search sees to that, on local Rays too
}


class LeanTrainer(TorchTrainer):
    """``fit`` as Train has it, with a worker group of fixed size."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["callbacks"] = [each for each in parts.get("callbacks", ()) if type(each).__name__ not in UNUSED]
        if type(parts.get("scaling_policy")).__name__ == "FixedScalingPolicy":
            parts["scaling_policy"] = unannounced(parts["scaling_policy"])
        return super()._initialize_and_run_controller(**parts)


def unannounced(policy: Any) -> Any:
    """The policy without its actor that weighs Train's wish for workers against Ray Data's: nobody else has wishes, and
    a cluster that can grow does so for the workers' placement group."""
    policy.after_controller_start = nothing
    policy._maybe_send_resource_request = nothing
    return policy


def nothing(*arguments: Any, **options: Any) -> None:
    """A hook that does nothing."""


class TellBroker(UserCallback):
    """Runs beside Train's controller: the broker hears at once that a worker was lost, so that its trials go on
    elsewhere while Train looks for room to start it again."""

    def __init__(self, worker: str, broker: Any) -> None:
        self._worker = worker
        self._broker = broker

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._broker.leave.remote(self._worker, ray.get_runtime_context().current_actor)


def torch_config(placement: Placement) -> TorchConfig:
    """Gradients go from accelerator to accelerator where there are any. A group waits for its orders without end."""
    backend = "nccl" if placement.gpus and placement.workers_per_group > 1 else "gloo"
    return TorchConfig(backend=backend, timeout_s=int(PATIENCE.total_seconds()))


class WorkerGroup(threading.Thread):
    """One trainer, run in a thread of the driver. ``error`` is what ended it, if anything went wrong."""

    def __init__(self, config: WorkerConfig, storage: Path, on_error: Any) -> None:
        super().__init__(name=f"worker-group-{config.name}", daemon=True)
        self.worker = config.name
        self.error: Exception | None = None
        self._on_error = on_error
        self._trainer = LeanTrainer(
            train_loop,
            train_loop_config={"worker": config},
            scaling_config=ScalingConfig(
                num_workers=config.placement.workers_per_group,
                use_gpu=config.placement.gpus > 0,
                resources_per_worker=config.placement.worker_resources(),
            ),
            torch_config=torch_config(config.placement),
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
