"""The nodes of a Ray cluster and their resources."""

from __future__ import annotations

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class ClusterNode:
    """Total resources of one node that Ray may use."""

    cpus: float
    gpus: float = 0.0


def nodes() -> list[ClusterNode]:
    """List the live nodes with all the resources that Ray may use of them."""
    return [
        ClusterNode(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
