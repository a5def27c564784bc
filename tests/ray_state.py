"""What lives in the session's Ray, and waiting for what takes Ray a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state

# One a cluster, made by the first search and kept; what tidies up after a lost controller, which needs a dashboard.
RAYS_OWN = ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")
WAIT_S = 90.0  # a limit for what will never come; what does come takes a second or two


def actors(named: str = "") -> dict[str, dict[str, Any]]:
    """Actors that live, by id; only those of one class when it is named."""
    found = {key: info for key, info in state.actor_table(None).items() if info["State"] != "DEAD"}
    return {key: info for key, info in found.items() if named in ("", info["ActorClassName"])}


def holders() -> set[str]:
    """Ids of what holds something in Ray: actors and placement groups."""
    groups = ray.util.placement_group_table().items()
    ours = {key for key, info in actors().items() if info["ActorClassName"] not in RAYS_OWN}
    return ours | {key for key, info in groups if info["state"] != "REMOVED"}


def eventually(condition: Callable[[], Any]) -> Any:
    """The condition's first true value; what it is at the end of a long wait otherwise."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value
