"""A tree of values that remember where they stand and what was wrong with their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.errors import Problem
from orchestrator.job.yaml.scalars import TOO_DEEP, Unreadable, is_scalar, scalar
from orchestrator.job.yaml.wording import below, show

MAX_NODES = 100_000  # aliases of aliases can expand to more values than fit into memory
MAX_DEPTH = 50

TAG = "tag:yaml.org,2002:"
Parents = tuple[yaml.Node, ...]


@dataclass
class Node:
    """A value and its location: the line of its key or, in a list, its own line."""

    file: str  # the file, or the --set option that the value came from
    line: int | None
    where: str
    value: Any = None  # dict[Any, Node], list[Node] or a scalar
    # Found while reading; they disappear when the value is replaced.
    problems: list[Problem] = field(default_factory=list)

    def note(self, message: str, hint: str = "", line: int | None = None) -> None:
        """Add a problem of this value."""
        self.problems.append(Problem(self.file, line or self.line, self.where, message, hint))

    def found(self) -> Iterator[Problem]:
        """Yield the problems of this value and of all values inside it."""
        yield from self.problems
        if isinstance(self.value, dict | list):
            for child in self.value.values() if isinstance(self.value, dict) else self.value:
                yield from child.found()

    def plain(self) -> Any:
        """Return the value without locations."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return (
            [child.plain() for child in self.value] if isinstance(self.value, list) else self.value
        )

    def reach(self, dotted: str) -> Node:
        """Return the node at ``dotted`` below this one, or the last node on the way there."""
        node = self
        for name in dotted.split("."):
            if not isinstance(node.value, dict) or name not in node.value:
                break
            node = node.value[name]
        return node


def grow(node: yaml.Node, file: str, where: str = "", lines: bool = True) -> Node:
    """Build the tree below ``node``, whose key is ``where``.

    Raises Unreadable when the tree is too large or too deep.
    """
    growth = _Growth(file, lines)
    return growth.node(node, where, growth.line(node), ())


class _Growth:
    """The conversion of one text to a tree."""

    def __init__(self, file: str, lines: bool) -> None:
        self.file = file
        self.lines = lines
        self.size = 0

    def line(self, source: yaml.Node) -> int | None:
        """Return the 1-based line on which ``source`` starts."""
        return source.start_mark.line + 1 if self.lines else None

    def node(self, source: yaml.Node, where: str, line: int | None, parents: Parents) -> Node:
        """Build the tree below ``source``; an unreadable value becomes a node with a problem."""
        self.size += 1
        if self.size > MAX_NODES:
            raise Unreadable(f"holds more than {MAX_NODES} values, aliases counted each time")
        if len(parents) == MAX_DEPTH:
            raise Unreadable(TOO_DEEP)
        node = Node(self.file, line, where)
        inner = (*parents, source)
        if source in parents:
            node.note("is an alias of a value that holds it; write the value out")
        elif isinstance(source, yaml.MappingNode) and source.tag == f"{TAG}map":
            node.value = {}
            self._fill(node, source, inner)
        elif isinstance(source, yaml.SequenceNode) and source.tag == f"{TAG}seq":
            items = enumerate(source.value)
            node.value = [
                self.node(item, f"{where}[{i}]", self.line(item), inner) for i, item in items
            ]
        elif is_scalar(source):
            node.value = scalar(source)
        else:
            node.note(
                f"has the tag {source.tag.replace(TAG, '!!')}; a job spec takes plain values only"
            )
        return node

    def _fill(self, node: Node, source: yaml.MappingNode, parents: Parents) -> None:
        merges = []
        for key, value in source.value:
            line = self.line(key)
            name = scalar(key) if is_scalar(key) else None
            if name == "<<" and key.style is None:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                merges += [(line, part) for part in parts]
            elif name is None:
                printable_key = (
                    show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                )
                node.note(f"{printable_key} can't be a key; write text in quotes", line=line)
            else:
                first_node = node.value.get(name)
                spelling = next((key for key in node.value if key == name), name)
                node.value[name] = self.node(value, below(node.where, name), line, parents)
                if first_node:
                    first_mention = ""
                    if line:
                        spelled = _otherwise(spelling, name)
                        first_mention = f", first{spelled} on line {first_node.line}"
                    node.value[name].note(f"is given twice{first_mention}", "keep one")
        for line, part in merges:
            self._merge(node, self.node(part, node.where, line, parents), line)

    def _merge(self, node: Node, source: Node, line: int | None) -> None:
        if isinstance(source.value, dict):
            node.value = source.value | node.value  # keys written out, or merged earlier, win
            node.problems += source.problems
        else:
            node.note("<< takes an alias of another mapping, or a list of them", line=line)


def _otherwise(spelling: Any, name: Any) -> str:
    """Name the first spelling of a repeated key where it differs.

    1 and 1.0, or 1 and true, can't be two keys.
    """
    return "" if type(spelling) is type(name) else f" as {show(spelling)}"
