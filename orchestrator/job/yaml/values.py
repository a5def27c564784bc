"""A job spec from Python's values, checked as a YAML file is, with all problems at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml.load import checked
from orchestrator.job.yaml.tree import MAX_DEPTH, Node
from orchestrator.job.yaml.wording import below

SOURCE = "Job"  # stands where messages about a file have the file's name


def read_values(document: Mapping[Any, Any]) -> JobSpec:
    """Make a job spec of nested mappings, lists, scalars and sections of other specs.

    Tuples count as lists, paths as texts, and numbers of numpy as Python's. Raises SpecError with
    all problems.
    """
    return checked(_node(document, "", 0))


def _node(value: Any, where: str, depth: int) -> Node:
    """Build the tree below a value; a value of another type becomes a node with a problem."""
    node = Node(SOURCE, None, where)
    value = _plain(value)
    if depth > MAX_DEPTH:
        node.note(f"holds more than {MAX_DEPTH} lists and mappings inside each other")
    elif isinstance(value, Mapping):
        node.value = {}
        for name, inner in value.items():
            if isinstance(name, str | int | float):
                node.value[name] = _node(inner, below(where, name), depth + 1)
            else:
                node.note(f"a {type(name).__name__} can't be a key; write text")
    elif isinstance(value, list | tuple):
        node.value = [_node(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]
    elif isinstance(value, str) and not _is_text(value):
        node.note("holds half a character, which is no text", "write the whole character")
    elif value is None or isinstance(value, str | int | float):
        node.value = value
    else:
        kind = type(value).__name__
        node.note(f"is a {kind}; write text, a number, true or false, a list or a mapping")
    return node


def _plain(value: Any) -> Any:
    """Return sections, paths and single values of numpy as mappings, texts and numbers."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
