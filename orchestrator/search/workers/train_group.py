"""A group of workers under one trainer of Ray Train; the only module that imports ray.train.

Train starts processes that a search has no use for. Each takes two seconds of a core, before or
beside the start of the worker, which the search waits for. This module leaves them out by Ray's
internal names; if another version of Ray renames them, they start as usual.

Train's controller imports this file before it starts a worker. For that reason nothing here imports
torch: only the controller of a group of several workers needs torch, to set up their process group.

Train also passes environment variables to its processes, because the processes of a cluster do not
have the driver's variables. Ray then makes each process in two steps: a Python that imports Ray to
set the variables, and another Python that imports Ray again. The processes that Ray has ready stay
idle. A Ray that was started here has all of the variables anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup as TrainWorkers
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.cluster.ray_threads import RayThread
from orchestrator.cluster.session import started_here
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.worker import WorkerConfig, train_loop

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import Result
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

    from orchestrator.search.workers.broker import BrokerHandle

RESTARTS = 3  # of a worker that dies; its trials go on from their newest checkpoints
UNUSED = {
    # Hands out the rows of Ray Data; our rows go to the workers as one object.
    "DatasetsCallback",
    # Cleans up after a controller that died; the search does so itself, on a local Ray too.
    "PlacementGroupCleanerCallback",
}


class LeanTrainer(DataParallelTrainer):
    """A Train trainer for groups of fixed size, with a controller that can be ended early."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._controller: ActorHandle | None = None
        self._given_up = False
        self._making = threading.Lock()

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["callbacks"] = [
            each for each in parts.get("callbacks", ()) if type(each).__name__ not in UNUSED
        ]
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
        """Have the controller end its workers, free their resources and exit; this ends ``fit``."""
        with self._making:
            self._given_up = True
            controller = self._controller
        if controller is not None:
            controller.abort.remote()

    def kill(self) -> None:
        """Kill the controller's process.

        Its workers' processes end by themselves. The resources that the controller held are not
        freed.
        """
        controller = self._controller
        if controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(controller)


class GivenUp(Exception):
    """Raised when the search is given up before Train's controller is made."""


def make_controller(
    callbacks: list[UserCallback | ControllerCallback], **parts: Any
) -> ActorHandle:
    """Start Train's controller on this node.

    In a Ray that was started here, the controller and its workers have the node's environment. On a
    cluster, the controller gets the variables that Train passes on.
    """
    options: dict[str, Any] = {}
    if started_here():
        callbacks = [*callbacks, PlainWorkers()]
    else:
        options["runtime_env"] = {"env_vars": get_env_vars_to_propagate()}
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    remote = ray.remote(num_cpus=0, label_selector=here, **options)(TrainController).remote
    return remote(callbacks=callbacks, **parts)


class PlainWorkers(ControllerCallback):
    """A callback in Train's controller that leaves its workers the node's environment."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        TrainWorkers._get_worker_runtime_env = staticmethod(no_environment)


def no_environment(custom_runtime_env: Any) -> dict[str, Any]:
    """Return the variables that a worker's process needs besides its node's: none."""
    return {}


def unannounced(policy: ScalingPolicy) -> ScalingPolicy:
    """Keep a scaling policy from starting the actor that announces Train's resource requests.

    That actor weighs Train's request for workers against requests of Ray Data, which a search does
    not use. A cluster that can grow does so for the workers' placement group.
    """
    policy.after_controller_start = nothing
    policy._maybe_send_resource_request = nothing
    return policy


def nothing(*arguments: Any, **options: Any) -> None:
    """Do nothing, as a replacement of a hook."""


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
