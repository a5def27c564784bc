"""Queries of the session's Ray, and waiting for Ray to catch up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state

# Ray makes each of these actors once per cluster, at the first search, and keeps it. The cleaner
# removes placement groups of a lost controller; it needs a dashboard.
RAYS_OWN = ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")
WAIT_S = 90.0  # only reached by a failure: what happens at all takes a second or two


def actors(named: str = "") -> dict[str, dict[str, Any]]:
    """Return live actors by id, optionally only those of one class."""
    found = {key: info for key, info in state.actor_table(None).items() if info["State"] != "DEAD"}
    return {key: info for key, info in found.items() if named in ("", info["ActorClassName"])}


def holders() -> set[str]:
    """Return the ids of everything that holds resources in Ray: actors and placement groups."""
    groups = ray.util.placement_group_table().items()
    ours = {key for key, info in actors().items() if info["ActorClassName"] not in RAYS_OWN}
    return ours | {key for key, info in groups if info["state"] != "REMOVED"}


def eventually(condition: Callable[[], Any]) -> Any:
    """Return the condition's first true value, or its last value after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value
