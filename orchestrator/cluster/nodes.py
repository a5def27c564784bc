"""The nodes of a Ray cluster, and what they have."""

from __future__ import annotations

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Node:
    """Free resources of one node."""

    cpus: float
    gpus: float = 0.0


def nodes() -> list[Node]:
    """What the live nodes have, and at most what Ray may use of it."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
