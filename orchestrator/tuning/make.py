"""The engine that a job's method needs."""

from __future__ import annotations

from orchestrator.backbone import Backbone
from orchestrator.spec import BASELINES, SearchSpec, TrainSpec
from orchestrator.tuning.baseline_engine import BaselineEngine, DesignEngine
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.group import Group


def make_engine(
    backbone: Backbone, task: Task, train: TrainSpec, search: SearchSpec, capacity: int, group: Group = Group()
) -> Engine:
    """An engine for the task's method. Baselines have one slot, whatever ``capacity`` is."""
    method = task.method.name
    if method not in BASELINES:
        return Engine(backbone, task, train, search, capacity, group=group)
    kind = DesignEngine if method == "prompt_design" else BaselineEngine
    return kind(backbone, task, train, search, 1, group=group)
