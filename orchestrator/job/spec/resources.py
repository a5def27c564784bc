"""The section ``resources``: what the workers take from this machine or the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.job.spec.base import Auto, Conflict, PositiveInt, Section


class ResourcesSpec(Section):
    """Resources that the workers take from this machine or the cluster."""

    workers: PositiveInt | Auto = "auto"
    """Number of worker groups. auto means as many as there are GPUs for, or one per node without
    GPUs; more start when nodes join."""
    workers_per_group: PositiveInt = 1
    """Number of workers that train the same trials together, each on its part of every batch. The
    result is the same as with one worker."""
    trials_per_worker: PositiveInt | Auto = "auto"
    """Number of trials that are packed into one forward pass."""
    cpus_per_worker: PositiveInt | Auto = "auto"
    """Number of CPU cores that each worker reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Number of accelerators that each worker reserves, at most 1; 0 trains on the CPU."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Niceness of the workers' processes on a Ray that is started on this machine: 0 takes its
    share of the cores beside other work, 19 only what other work leaves. A running cluster has its
    own."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp splits the frozen weights of the model's blocks among a group's workers, for models that
    do not fit on one device."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.sharding != "none" and self.workers_per_group == 1:
            text = (
                f"{self.sharding} splits the weights among a group's workers, and "
                "resources.workers_per_group is 1"
            )
            yield Conflict(
                "sharding", f"{text}; raise it, or leave sharding out", ("workers_per_group",)
            )
        gpus = self.gpus_per_worker
        if not isinstance(gpus, str) and gpus > 1:
            text = f"{gpus:g}, and a worker trains on one GPU: the others would idle"
            hint = (
                "set it to 1, and raise resources.workers, or resources.workers_per_group to "
                "train steps together"
            )
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ())
        if self.workers_per_group > 1 and not isinstance(gpus, str) and 0 < gpus < 1:
            text = (
                f"{gpus:g} would put several of a group's workers on one GPU, which can't talk "
                "to itself"
            )
            hint = (
                "set it to 1, or set resources.workers_per_group to 1 and raise resources.workers"
            )
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ("workers_per_group",))
