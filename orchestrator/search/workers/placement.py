"""The placement of a search on a cluster: worker groups, their resources and slots.

A pure function decides it.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cluster.nodes import ClusterNode
from orchestrator.errors import BadInput
from orchestrator.job.spec import ResourcesSpec

TRIAL_CPUS = 0.001  # a Tune trial only relays reports, but Tune refuses a request for no CPU
# Packing gains little on a CPU, and with few trials at a time the scheduler learns more.
CPU_SLOTS = 4
GPU_SLOTS = 8


@dataclass(frozen=True)
class Placement:
    """A placement: ``workers`` groups of ``workers_per_group`` workers each.

    Each worker requests ``cpus`` and ``gpus`` from Ray and computes with ``threads`` threads. A
    group seats ``trials_per_worker`` trials, which run on all of its workers.
    """

    workers: int
    cpus: int
    gpus: float
    threads: int
    trials_per_worker: int
    workers_per_group: int = 1

    def worker_resources(self) -> dict[str, float]:
        """Return the resources that a worker requests from Ray.

        They are a little less than its CPUs, so that the Tune processes of its trials fit beside
        it.
        """
        cpus = max(TRIAL_CPUS, self.cpus - self.trials_per_worker * TRIAL_CPUS)
        return {"CPU": cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def slots(self) -> int:
        """Trials that run at a time."""
        return self.workers * self.trials_per_worker

    @property
    def processes(self) -> int:
        """Number of workers in all groups."""
        return self.workers * self.workers_per_group


def room_for_groups(placement: Placement, nodes: list[ClusterNode]) -> int:
    """Count the groups of the placement's size that the nodes can hold in all."""
    able = [node for node in nodes if node.gpus >= placement.gpus and node.cpus >= 1]
    return (
        sum(_room(node, placement.cpus, placement.gpus) for node in able)
        // placement.workers_per_group
    )


def place(resources: ResourcesSpec, nodes: list[ClusterNode], trials: int) -> Placement:
    """Place a search of so many trials on the nodes.

    Without accelerators, a worker uses all threads of a node but requests one CPU less than the
    node has, which is left for the other processes there. The workers of a group may be on several
    nodes.

    Raises BadInput when the cluster can't hold all workers at once.
    """
    gpus = _gpus(resources, nodes)
    able = [node for node in nodes if node.gpus >= gpus and node.cpus >= 1]
    workers, together = _workers(resources, able, gpus), resources.workers_per_group
    seats = _seats(able, workers * together, gpus)
    if resources.cpus_per_worker == "auto":
        cpus = max(1, int(min(((node.cpus - 1) // count for node, count in seats), default=1)))
        threads = max(1, int(min((node.cpus // count for node, count in seats), default=1)))
    else:
        cpus = threads = resources.cpus_per_worker
    if sum(_room(node, cpus, gpus) for node in able) < workers * together:
        groups = f" in {_count(workers, 'group')}" if together > 1 else ""
        raise BadInput(
            f"resources: {_count(workers * together, 'worker')}{groups} of {_count(cpus, 'CPU')} "
            f"and {_count(gpus, 'GPU')} each; there {'is' if len(nodes) == 1 else 'are'} "
            f"{_count(len(nodes), 'node')}, the largest with "
            f"{max((node.cpus for node in nodes), default=0):g} CPUs and "
            f"{max((node.gpus for node in nodes), default=0):g} GPUs",
            f"lower resources.workers, {'resources.workers_per_group, ' if together > 1 else ''}"
            "resources.cpus_per_worker or resources.gpus_per_worker, or use a larger cluster",
        )
    asked = resources.trials_per_worker
    slots = (
        min(GPU_SLOTS if gpus else CPU_SLOTS, -(-trials // workers)) if asked == "auto" else asked
    )
    return Placement(workers, cpus, gpus, threads, slots, together)


def _gpus(resources: ResourcesSpec, nodes: list[ClusterNode]) -> float:
    """Return the GPUs per worker; with auto, one if any node has a GPU."""
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def _workers(resources: ResourcesSpec, able: list[ClusterNode], gpus: float) -> int:
    """Return the number of groups; with auto, as many as the nodes can hold."""
    if resources.workers != "auto":
        return resources.workers
    least = 1 if resources.cpus_per_worker == "auto" else resources.cpus_per_worker
    places = sum(_times(gpus, node.gpus) if gpus else node.cpus >= least for node in able)
    return max(1, places // resources.workers_per_group)


def _seats(able: list[ClusterNode], workers: int, gpus: float) -> list[tuple[ClusterNode, int]]:
    """Distribute the workers, each to the node that leaves its workers the most CPUs.

    Returns the nodes that get workers with the count of each, or nothing if the GPUs do not
    suffice.
    """
    counts = [0] * len(able)
    for _ in range(workers):
        free = [
            place
            for place, node in enumerate(able)
            if not gpus or counts[place] < _times(gpus, node.gpus)
        ]
        if not free:
            return []
        counts[max(free, key=lambda place: able[place].cpus / (counts[place] + 1))] += 1
    return [(node, count) for node, count in zip(able, counts, strict=True) if count]


def _room(node: ClusterNode, cpus: int, gpus: float) -> int:
    """Count the workers that the node can hold."""
    return (
        min(_times(cpus, node.cpus), _times(gpus, node.gpus)) if gpus else _times(cpus, node.cpus)
    )


def _times(part: float, whole: float) -> int:
    """Count how often ``part`` fits into ``whole``, with a tolerance for rounding errors."""
    return int(whole / part + 1e-6)


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")
