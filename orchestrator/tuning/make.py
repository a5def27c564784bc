"""The choice of the engine for a job's method."""

from __future__ import annotations

from orchestrator.job.metrics import custom_function, is_custom
from orchestrator.job.spec import BASELINES, SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.engine import BaselineEngine, DesignEngine
from orchestrator.tuning.baselines.lomo_engine import LomoEngine
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.worker_group import Group

ENGINES: dict[str, type[Engine]] = {"prompt_design": DesignEngine, "lomo": LomoEngine}
"""The engines of baselines that ``BaselineEngine`` does not train."""


def make_engine(
    backbone: Backbone,
    task: Task,
    train: TrainSpec,
    search: SearchSpec,
    capacity: int,
    group: Group = Group(),
    cores: int = 1,
) -> Engine:
    """Create the engine for the task's method, using ``cores`` cores of this process.

    Baselines have one slot, whatever ``capacity`` is. Raises BadInput if the search ranks by a
    metric of the user's own that can't be imported here.
    """
    if is_custom(search.metric):
        custom_function(search.metric)
    method = task.method.name
    # All workers of a sharded model meet in every forward to gather its weights, so forwards can't
    # run side by side.
    threads = (
        Threads(cores) if backbone.sharded else Threads.of(cores, backbone.model, backbone.device)
    )
    if method not in BASELINES:
        return Engine(backbone, task, train, search, capacity, group=group, threads=threads)
    kind = ENGINES.get(method, BaselineEngine)
    return kind(backbone, task, train, search, 1, group=group, threads=threads)
