"""How a search's workers are placed on a cluster's nodes."""

from __future__ import annotations

import pytest

from orchestrator.errors import BadInput
from orchestrator.job.spec import ResourcesSpec
from orchestrator.search.workers.placement import (
    CPU_SLOTS,
    GPU_SLOTS,
    TRIAL_CPUS,
    ClusterNode,
    Placement,
    place,
    room_for_groups,
)

AUTO = ResourcesSpec()


def test_one_worker_takes_a_cpu_node() -> None:
    """Without GPUs, a node holds one worker, which computes with every core.

    The worker asks Ray for one core fewer, which is left for everything else.
    """
    assert place(AUTO, [ClusterNode(8)], 12) == Placement(
        workers=1, cpus=7, gpus=0, threads=8, trials_per_worker=CPU_SLOTS
    )
    assert place(AUTO, [ClusterNode(8), ClusterNode(8)], 12).workers == 2
    assert place(AUTO, [ClusterNode(1)], 12) == Placement(
        workers=1, cpus=1, gpus=0, threads=1, trials_per_worker=CPU_SLOTS
    )


def test_a_worker_a_gpu() -> None:
    """Each GPU gets a worker, and the workers of a node share its cores."""
    assert place(AUTO, [ClusterNode(16, 4)], 64) == Placement(
        4, cpus=3, gpus=1, threads=4, trials_per_worker=GPU_SLOTS
    )
    assert place(AUTO, [ClusterNode(16, 1), ClusterNode(16, 1)], 64) == Placement(
        2, 15, 1, 16, GPU_SLOTS
    )


def test_nodes_without_a_gpu_do_not_count_where_gpus_are() -> None:
    """Where other nodes have GPUs, a head without any gets no workers and sets no sizes."""
    assert place(AUTO, [ClusterNode(64), ClusterNode(8, 1)], 64) == Placement(
        1, cpus=7, gpus=1, threads=8, trials_per_worker=8
    )


def test_unequal_nodes_are_shared_by_what_each_has() -> None:
    """Nine workers are placed on nodes of eight GPUs and of one GPU, one per GPU.

    Their size is that of the fuller node.
    """
    placed = place(AUTO, [ClusterNode(64, 8), ClusterNode(64, 1)], 90)
    assert (placed.workers, placed.cpus) == (9, 7)


def test_there_are_no_more_slots_than_trials() -> None:
    """Few trials are spread over the workers rather than packed into some of them."""
    assert place(AUTO, [ClusterNode(8)], 2).trials_per_worker == 2
    assert place(AUTO, [ClusterNode(32, 4)], 6).trials_per_worker == 2


def test_explicit_values_hold() -> None:
    """Explicit settings of the spec are used as given."""
    asked = ResourcesSpec(workers=2, cpus_per_worker=3, gpus_per_worker=0.5, trials_per_worker=11)
    assert place(asked, [ClusterNode(8, 1)], 4) == Placement(
        2, cpus=3, gpus=0.5, threads=3, trials_per_worker=11
    )
    assert place(ResourcesSpec(gpus_per_worker=0), [ClusterNode(8, 2)], 12).gpus == 0


def test_a_group_is_several_workers() -> None:
    """A group's workers each have their own CPUs and GPUs, on one node or on several.

    The group has as many slots as one worker.
    """
    two = ResourcesSpec(workers_per_group=2)
    assert place(two, [ClusterNode(8)], 12) == Placement(1, 3, 0, 4, CPU_SLOTS, workers_per_group=2)
    assert place(two, [ClusterNode(16, 4)], 64) == Placement(
        2, 3, 1, 4, GPU_SLOTS, workers_per_group=2
    )
    apart = place(two, [ClusterNode(16, 1), ClusterNode(16, 1)], 64)
    assert apart == Placement(1, 15, 1, 16, GPU_SLOTS, workers_per_group=2)
    assert (apart.slots, apart.processes) == (GPU_SLOTS, 2)


def test_room_counts_groups() -> None:
    """Room is counted by the total of the nodes, in use or not.

    For groups all workers count, on whichever nodes they are.
    """
    alone = Placement(1, cpus=3, gpus=1, threads=4, trials_per_worker=8)
    assert room_for_groups(alone, [ClusterNode(16, 4)]) == 4
    assert room_for_groups(alone, [ClusterNode(16, 4), ClusterNode(64), ClusterNode(2, 8)]) == 4
    pairs = Placement(1, cpus=4, gpus=0, threads=4, trials_per_worker=4, workers_per_group=2)
    assert [room_for_groups(pairs, [ClusterNode(7)] * count) for count in (1, 2, 3, 4)] == [
        0,
        1,
        1,
        2,
    ]


@pytest.mark.parametrize("trials", [1, 4, 1000])
def test_the_relays_fit_beside_the_worker(trials: int) -> None:
    """A worker that takes a whole node leaves CPUs for its trials; Ray would wait for ever
    otherwise."""
    placed = place(ResourcesSpec(cpus_per_worker=2), [ClusterNode(2)], trials)
    assert placed.worker_resources()["CPU"] + placed.slots * TRIAL_CPUS <= 2


@pytest.mark.parametrize(
    ("asked", "nodes", "named"),
    [
        (
            ResourcesSpec(cpus_per_worker=16),
            [ClusterNode(8), ClusterNode(8)],
            "1 worker of 16 CPUs",
        ),
        (ResourcesSpec(workers=9), [ClusterNode(8)], "9 workers of 1 CPU"),
        (ResourcesSpec(gpus_per_worker=1), [ClusterNode(8)], "1 GPU"),
        (
            ResourcesSpec(workers=3, gpus_per_worker=1),
            [ClusterNode(8, 1), ClusterNode(8, 1)],
            "3 workers",
        ),
        (ResourcesSpec(workers=3, gpus_per_worker=0.5), [ClusterNode(8, 1)], "3 workers"),
        (ResourcesSpec(), [], "there are 0 nodes"),
        (ResourcesSpec(workers_per_group=2), [ClusterNode(1)], "2 workers in 1 group of 1 CPU"),
        (
            ResourcesSpec(workers=2, workers_per_group=2),
            [ClusterNode(16, 3)],
            "4 workers in 2 groups of 1 CPU and 1 GPU",
        ),
    ],
)
def test_what_cannot_fit_is_refused(
    asked: ResourcesSpec, nodes: list[ClusterNode], named: str
) -> None:
    """A request for which Ray would wait for ever is BadInput.

    The message names what was asked for and what the nodes have.
    """
    with pytest.raises(BadInput, match=named) as refused:
        place(asked, nodes, 8)
    assert "resources." in refused.value.hint
