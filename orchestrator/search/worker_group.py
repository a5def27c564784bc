"""A group of workers under one trainer of Ray Train. The only importer of ray.train.

Train starts processes that a search has no use for; each takes two seconds of a core, before or beside the worker's
own, which a search waits for. What they are is Ray's own business and may be called otherwise in another version: then
they start as ever.

Train's controller imports this file before it starts a worker, so that nothing here imports torch: only the controller
of a group of several workers, which torch has to bring together, needs it.

Train also hands environment variables to its processes, for clusters, whose processes know nothing of the driver's. Ray
then makes each of them in two steps, a Python that imports Ray to set the variables and another one that imports it
again, and leaves those processes idle that it has ready. A Ray that was started here has all of the variables anyway.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup as TrainWorkers
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.ray_threads import RayThread
from orchestrator.search.cluster_session import started_here
from orchestrator.search.placement import Placement
from orchestrator.search.worker import WorkerConfig, train_loop

RESTARTS = 3  # of a worker that dies; its trials go on from their newest checkpoints
UNUSED = {
    "DatasetsCallback",  # hands out Ray Data's rows: ours go to the workers as one object
    "PlacementGroupCleanerCallback",  # after a controller that died: the search sees to that, on local Rays too
}


class LeanTrainer(DataParallelTrainer):
    """``fit`` as Train has it, with a worker group of fixed size, and a controller that can be ended early."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._controller: Any = None
        self._given_up = False
        self._making = threading.Lock()

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["callbacks"] = [each for each in parts.get("callbacks", ()) if type(each).__name__ not in UNUSED]
        if type(parts.get("scaling_policy")).__name__ == "FixedScalingPolicy":
            parts["scaling_policy"] = unannounced(parts["scaling_policy"])
        with self._making:
            if self._given_up:
                raise GivenUp
            self._controller = make_controller(**parts)
        try:
            ray.get(self._controller.run.remote())
            return ray.get(self._controller.get_result.remote())
        finally:
            self._controller = None  # Ray ends an actor once nobody refers to it

    def abort(self) -> None:
        """Have the controller end its workers, free their resources and end itself, which ends ``fit``."""
        with self._making:
            self._given_up = True
            controller = self._controller
        if controller is not None:
            controller.abort.remote()

    def kill(self) -> None:
        """End the controller's process; its workers' follow by themselves. What it held is not freed."""
        controller = self._controller
        if controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(controller)


class GivenUp(Exception):
    """The search was given up before Train's controller was made."""


def make_controller(callbacks: list[Any], **parts: Any) -> Any:
    """Train's controller on this node: with this node's environment in a Ray that was started here, and with the
    variables that Train hands on elsewhere."""
    options: dict[str, Any] = {}
    if started_here():
        callbacks = [*callbacks, PlainWorkers()]
    else:
        options["runtime_env"] = {"env_vars": get_env_vars_to_propagate()}
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    remote = ray.remote(num_cpus=0, label_selector=here, **options)(TrainController).remote
    return remote(callbacks=callbacks, **parts)


class PlainWorkers(ControllerCallback):
    """In Train's controller: its workers have the node's environment too."""

    def after_controller_start(self, train_run_context: Any) -> None:
        TrainWorkers._get_worker_runtime_env = staticmethod(no_environment)


def no_environment(custom_runtime_env: Any) -> dict[str, Any]:
    """What a worker's process needs of variables besides its node's."""
    return {}


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


def backend(placement: Placement) -> BackendConfig:
    """None for a worker alone; torch's process group for several. Gradients go from accelerator to accelerator where
    there are any. A group waits for its orders without end."""
    if placement.workers_per_group == 1:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    from orchestrator.tuning.group import PATIENCE

    return TorchConfig(backend="nccl" if placement.gpus else "gloo", timeout_s=int(PATIENCE.total_seconds()))


class WorkerGroup(RayThread):
    """One trainer, run in a thread of the driver. ``error`` is what ended it, if anything went wrong."""

    def __init__(self, config: WorkerConfig, storage: Path, on_error: Any) -> None:
        super().__init__(f"worker-group-{config.name}")
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
        except Exception as error:  # Train wraps whatever happened in a worker in its own types
            self.error = error
            self._on_error(error)

    def abort(self) -> None:
        """End the workers and the thread, in Train's own way."""
        self._trainer.abort()

    def kill(self) -> None:
        """End them where Train does not."""
        self._trainer.kill()
