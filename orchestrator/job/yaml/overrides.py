"""Overrides of the form ``--set a.b.c=VALUE``, applied to the tree of a file."""

from __future__ import annotations

import json
import re

import yaml

from orchestrator.errors import Problem
from orchestrator.job.yaml.scalars import Unreadable, compose, unquoted
from orchestrator.job.yaml.tree import Node, grow
from orchestrator.job.yaml.wording import below, encodable

PART = r'(?:"[^"]*"|[^."=]+)'
OVERRIDE = re.compile(rf"({PART}(?:\.{PART})*)=(.*)", re.DOTALL)


def lay_over(root: Node, override: str) -> None:
    """Set the value of ``override`` in the tree ``root``, and note problems with it there."""
    source = encodable(f"--set {override}")
    match = OVERRIDE.fullmatch(override)
    if not match:
        message = "names no key" if "=" in override else "has no ="
        hint = "write --set key=value, for instance train.steps=100"
        root.problems.append(Problem(source, None, "", message, hint))
        return
    # Parts are read as YAML reads keys: verbalizer.0 is a number, verbalizer."0" is text.
    *way, last = [
        part[1:-1] if part[0] == '"' else unquoted(part) for part in re.findall(PART, match[1])
    ]
    around = root
    for name in way:
        inner = around.value.get(name)
        if inner and isinstance(inner.value, list):
            message = f"{inner.where} is a list; set it as a whole"
            root.problems.append(Problem(source, None, encodable(match[1]), message))
            return
        if not inner or not isinstance(inner.value, dict):
            inner = around.value[name] = Node(source, None, below(around.where, name), {})
        around = inner
    around.value[last] = _node(match, Node(source, None, below(around.where, last)))


def _node(match: re.Match[str], empty: Node) -> Node:
    """Return the node for the value of an override; ``empty`` gives its location."""
    key, text = match.groups()
    try:
        node = compose(text)
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            raise Unreadable("is neither a scalar nor [a, b] nor {a: b}")
        return grow(node, empty.file, empty.where, lines=False) if node else empty
    except Unreadable as error:
        hint = f"put text in quotes: --set '{key}={json.dumps(text, ensure_ascii=False)}'"
        empty.note(f"the value {error}", encodable(hint))
        return empty
