"""Problems that are found after a job spec was read, at the lines of their keys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import Problem

from .tree import Node

STEP = re.compile(r"[^.\[\]]+|\[\d+\]")  # a name, or a place in a list


@dataclass(frozen=True)
class Places:
    """The values of a job spec that was read, and where each was written."""

    root: Node

    def problem(self, key: str, message: str, hint: str = "") -> Problem:
        """Make a problem of the value at ``key``, as in ``search.space.init[2].artifact``."""
        node = self._reach(key)
        return Problem(node.file, node.line, key, message, hint)

    def in_order(self, problems: list[Problem]) -> list[Problem]:
        """Sort problems by line, with those of values from ``--set`` behind them."""
        own_file = self.root.file
        return sorted(problems, key=lambda problem: (problem.file != own_file, problem.line or 0))

    def _reach(self, key: str) -> Node:
        """Find the node at ``key``, or the last one on the way to it: a default was not written."""
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
