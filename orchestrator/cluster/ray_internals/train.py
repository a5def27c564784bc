"""Workarounds that rely on the internals of Ray Train. Checked on Ray 2.60.

Train starts processes that a search has no use for. Each takes CPU seconds before or beside the
start of the worker, which the search waits for. ``LeanTrainer`` leaves them out by Ray's internal
names; if another version of Ray renames them, they start as usual.

Train also passes environment variables to its processes, because the processes of a cluster do not
have the driver's variables. Ray then makes each process in two steps: a Python that imports Ray to
set the variables, and another Python that imports Ray again. The processes that Ray has ready stay
idle. A Ray that was started here has all of the variables anyway.

Train's controller imports this file before it starts a worker. For that reason nothing here imports
torch.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup as TrainWorkers
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import Result
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

UNUSED = {
    # Hands out the rows of Ray Data; our rows go to the workers as one object.
    "DatasetsCallback",
    # Cleans up after a controller that died; the search does so itself, on a local Ray too.
    "PlacementGroupCleanerCallback",
}


class LeanTrainer(DataParallelTrainer):
    """A Train trainer for groups of fixed size, with a controller that can be ended early.

    ``plain`` says that Ray's processes have this process's environment. Train itself keeps its
    controller in a local variable and ends it only on SIGINT in the main thread.
    """

    def __init__(self, *arguments: Any, plain: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._plain = plain
        self._controller: ActorHandle | None = None
        self._given_up = False
        self._making = threading.Lock()

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["callbacks"] = [
            callback
            for callback in parts.get("callbacks", ())
            if type(callback).__name__ not in UNUSED
        ]
        if type(parts.get("scaling_policy")).__name__ == "FixedScalingPolicy":
            parts["scaling_policy"] = unannounced(parts["scaling_policy"])
        with self._making:
            if self._given_up:
                raise GivenUp
            self._controller = make_controller(self._plain, **parts)
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
    plain: bool, callbacks: list[UserCallback | ControllerCallback], **parts: Any
) -> ActorHandle:
    """Start Train's controller on this node.

    With ``plain``, the controller and its workers have the node's environment. On a cluster, the
    controller gets the variables that Train passes on.
    """
    options: dict[str, Any] = {}
    if plain:
        callbacks = [*callbacks, PlainWorkers()]
    else:
        options["runtime_env"] = {"env_vars": get_env_vars_to_propagate()}
    this_node = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    remote = ray.remote(num_cpus=0, label_selector=this_node, **options)(TrainController).remote
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
