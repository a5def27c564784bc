"""How a search lies on a cluster: worker groups, their resources, and slots. Decided by a pure function."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import BadInput
from orchestrator.spec import ResourcesSpec

TRIAL_CPUS = 0.001  # a Tune trial only relays; Tune refuses none at all
CPU_SLOTS = 4  # packing pays little on a CPU, and few trials at a time leave the scheduler more to learn from
GPU_SLOTS = 8


@dataclass(frozen=True)
class Node:
    """Free resources of one node."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """``workers`` groups; each worker asks for ``cpus`` and ``gpus``, uses ``threads`` and seats so many trials."""

    workers: int
    cpus: int
    gpus: float
    threads: int
    trials_per_worker: int

    def worker_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus), **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def slots(self) -> int:
        return self.workers * self.trials_per_worker


def place(resources: ResourcesSpec, nodes: list[Node], trials: int) -> Placement:
    """The placement of a search of so many trials. BadInput when no node can hold a worker.

    Without accelerators one worker takes a whole node's threads but asks for a CPU less than the node has, which is
    where the trials' relays run.
    """
    gpus = _gpus(resources, nodes)
    workers = _workers(resources, nodes, gpus)
    on_a_node = max(1, -(-workers // max(1, len(nodes))))
    largest = max((node.cpus for node in nodes), default=0)
    cpus = max(1, int((largest - 1) // on_a_node)) if resources.cpus_per_worker == "auto" else resources.cpus_per_worker
    if not any(node.cpus >= cpus and node.gpus >= gpus for node in nodes):
        raise BadInput(
            f"resources: a worker asks for {cpus} CPUs and {gpus:g} GPUs; the largest node has {largest:g} CPUs and "
            f"{max((node.gpus for node in nodes), default=0):g} GPUs",
            "lower resources.cpus_per_worker or resources.gpus_per_worker, or use a larger cluster",
        )
    threads = max(1, int(largest // on_a_node)) if resources.cpus_per_worker == "auto" else cpus
    asked = resources.trials_per_worker
    slots = min(GPU_SLOTS if gpus else CPU_SLOTS, -(-trials // workers)) if asked == "auto" else asked
    return Placement(workers, cpus, gpus, threads, slots)


def _gpus(resources: ResourcesSpec, nodes: list[Node]) -> float:
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def _workers(resources: ResourcesSpec, nodes: list[Node], gpus: float) -> int:
    if resources.workers != "auto":
        return resources.workers
    return max(1, int(sum(node.gpus // gpus for node in nodes))) if gpus else 1
