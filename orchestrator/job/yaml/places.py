"""Locate problems that are found after a job spec was read, by the lines of their keys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import Problem
from orchestrator.job.yaml.tree import Node

STEP = re.compile(r"[^.\[\]]+|\[\d+\]")  # a name, or an index of a list


@dataclass(frozen=True)
class Places:
    """The values of a job spec that was read, and where each value was written."""

    root: Node

    def problem(self, key: str, message: str, hint: str = "") -> Problem:
        """Make a problem of the value at ``key``, such as ``search.space.init[2].artifact``."""
        node = self._reach(key)
        return Problem(node.file, node.line, key, message, hint)

    def in_order(self, problems: list[Problem]) -> list[Problem]:
        """Sort problems by line; those of values from ``--set`` come last."""
        return sorted(
            problems, key=lambda problem: (problem.file != self.root.file, problem.line or 0)
        )

    def _reach(self, key: str) -> Node:
        """Return the node at ``key``, or the last node on the way: defaults have no node."""
        node = self.root
        for step in STEP.findall(key):
            below = _below(node, step)
            if below is None:
                break
            node = below
        return node


def _below(node: Node, step: str) -> Node | None:
    if step.startswith("["):
        number = int(step[1:-1])
        items = node.value if isinstance(node.value, list) else []
        return items[number] if number < len(items) else None
    return node.value.get(step) if isinstance(node.value, dict) else None
