"""Ray Train's trainer without those of its processes that a search has no use for.

Each takes two seconds of a core to start, before or beside the worker's own, which a search waits for. What they are is
Ray's own business and may be called otherwise in another version: then they start as ever.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

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
