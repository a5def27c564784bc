"""Explain why a tree is not a JobSpec.

There is a problem for each bad value, and after them the conflicts between good values.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from orchestrator.errors import Problem
from orchestrator.job.spec import JobSpec, MethodSpace, Section
from orchestrator.job.yaml.scalars import unquoted
from orchestrator.job.yaml.tree import Node
from orchestrator.job.yaml.wording import below, describe, show
from orchestrator.utils.text import nearest

BAD = object()
# The same as in Section, because a value of a section is also checked on its own.
EXACT = ConfigDict(strict=True, allow_inf_nan=False)


def explain(root: Node) -> list[Problem]:
    """Return all problems of the values, except of values that could not be read."""
    explanation = _Explanation([problem.where for problem in root.found()])
    explanation.section(JobSpec, root)
    return explanation.problems


class _Explanation:
    """The problems so far, and the keys whose values are unknown because of them."""

    def __init__(self, unknown: list[str]) -> None:
        self.problems: list[Problem] = []
        self.unknown = unknown

    def section(self, section: type[Section], node: Node) -> Section:
        """Check each key of a section; return an instance that holds only the good values."""
        if not isinstance(node.value, dict):
            if not node.problems:
                self._refuse(section, node)
            return section.model_construct()
        for name in node.value:
            if name not in section.model_fields:
                self._refuse_key(section, name, node)
        good: dict[str, Any] = {}
        for name, field in section.model_fields.items():
            kind = field.rebuild_annotation()
            where = below(node.where, name)
            if name in node.value:
                good[name] = self.value(kind, node.value[name])
            elif field.is_required():
                # A misspelled key was already reported; do not report it as missing too.
                if where not in self.unknown:
                    self._note(
                        node,
                        f"is missing; allowed: {_allowed(kind)}",
                        field.description or "",
                        where,
                    )
                # The checks across keys read a section's values even when it is missing.
                good[name] = kind.model_construct() if _is_section(kind) else BAD
        built = _built(section, good, set(node.value).intersection(section.model_fields))
        self._check_across(built, node)
        return built

    def value(self, kind: Any, node: Node) -> Any:
        """Return the value as a ``kind``, or BAD after noting a problem.

        The problem is noted at the innermost value that is to blame.
        """
        if _is_section(kind):
            return self.section(kind, node)
        if any(node.found()):
            return BAD
        try:
            return _adapter(kind).validate_python(node.plain())
        except ValidationError as error:
            before = len(self.problems)
            self._explain_parts(kind, node)
            if len(self.problems) == before:
                own_messages = (
                    str(detail["ctx"]["error"])
                    for detail in error.errors()
                    if detail["type"] == "value_error"
                )
                self._refuse(kind, node, next(own_messages, ""))
            return BAD

    def _explain_parts(self, kind: Any, node: Node) -> None:
        """Note what is wrong inside a list or a mapping.

        The value is compared with the branch of ``kind`` that it was meant for.
        """
        value, branches = node.value, list(_branches(kind))
        for branch in branches:
            arguments = get_args(branch)
            if isinstance(value, dict) and get_origin(branch) is dict:
                self._explain_items(
                    arguments[0], [replace(item, value=name) for name, item in value.items()]
                )
                self._explain_items(arguments[1], value.values())
            elif isinstance(value, list) and get_origin(branch) is list:
                self._explain_items(arguments[0], value)
            elif (
                isinstance(value, list)
                and get_origin(branch) is tuple
                and len(value) == len(arguments)
            ):
                for inner, item in zip(arguments, value, strict=True):
                    self.value(inner, item)
        section = _meant_section(branches, value) if isinstance(value, dict) else None
        if section:
            self.section(section, node)

    def _explain_items(self, kind: Any, items: Iterable[Node]) -> None:
        adapter = _adapter(kind)  # shared by all items: a verbalizer may hold thousands of labels
        for item in items:
            if not _accepts(adapter, item.plain()):
                self.value(kind, item)

    def _check_across(self, section: Section, node: Node) -> None:
        """Note conflicts between good values; skip checks that depend on an unknown value."""
        prefix = f"{node.where}." if node.where else ""
        unknown = tuple(self.unknown)  # a copy, so that one conflict does not hide the next
        # The section's own validator would require a complete section.
        for where, message, reads in section._conflicts():
            keys = [prefix + key for key in (where, *reads)]
            if any(_overlap(key, bad_key) for key, bad_key in product(keys, unknown)):
                continue
            nodes = {key: node.reach(key) for key in (where, *reads)}
            # A default has no line of its own: point at a key that was written.
            written = (value for key, value in nodes.items() if value.where == prefix + key)
            self._note(next(written, nodes[where]), message, where=prefix + where)

    def _refuse_key(self, section: type[Section], name: Any, node: Node) -> None:
        # A key with exactly this name in another section is a better guess than a similar key here.
        elsewhere = [key for key in _known_keys(JobSpec) if f".{key}".endswith(f".{name}")]
        free = [field for field in section.model_fields if field not in node.value]
        near = ""
        if not elsewhere:
            near = nearest(str(name), free) or nearest(str(name), section.model_fields)
        if near:
            self.unknown.append(below(node.where, near))
        options = elsewhere or [near] * bool(near)
        hint = f"did you mean {' or '.join(options)}? " if options else ""
        self._note(
            node.value[name], "unknown key", f"{hint}allowed: {', '.join(section.model_fields)}"
        )

    def _refuse(self, kind: Any, node: Node, own_message: str = "") -> None:
        """Note that ``node`` is no ``kind``; ``own_message`` is that of the value's own check."""
        value = node.plain()
        self._note(
            node,
            f"{show(value)} {own_message or f'is not allowed; allowed: {_allowed(kind)}'}",
            _hint(kind, value),
        )

    def _note(self, node: Node, message: str, hint: str = "", where: str = "") -> None:
        self.unknown.append(where or node.where)
        self.problems.append(Problem(node.file, node.line, where or node.where, message, hint))


def _built(section: type[Section], good: dict[str, Any], written: set[Any]) -> Section:
    """Make an instance of the good values; ``written`` are the keys that the file has.

    A bad value is replaced by its default. Where there is no default, the empty text takes its
    place: checks across keys read it, and what they find there is not reported.
    """
    values = {name: value for name, value in good.items() if value is not BAD}
    for name in good.keys() - values.keys():
        if section.model_fields[name].is_required():
            values[name] = ""
    return section.model_construct(_fields_set=written, **values)


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind) if _is_section(kind) else TypeAdapter(kind, config=EXACT)


def _accepts(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
        return True
    except ValidationError:
        return False


def _branches(kind: Any) -> Iterator[Any]:
    """Yield the alternatives of a union, or anything else itself, without annotations."""
    if get_origin(kind) is Annotated:
        yield from _branches(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for branch in get_args(kind):
            yield from _branches(branch)
    else:
        yield kind


def _meant_section(branches: Iterable[Any], value: dict[Any, Node]) -> type[Section] | None:
    """Return the section that has a key of the value, or a similar key."""
    owners = {
        name: branch for branch in branches if _is_section(branch) for name in branch.model_fields
    }
    return next((owners[near] for name in value if (near := nearest(str(name), owners))), None)


def _known_keys(section: type[Section], where: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield below(where, name)
        if _is_section(field.annotation):
            yield from _known_keys(field.annotation, below(where, name))


def _overlap(first_key: str, second_key: str) -> bool:
    """Tell whether two keys are the same, or one is inside the other."""
    first = f"{first_key.replace('[', '.')}."
    second = f"{second_key.replace('[', '.')}."
    return first.startswith(second) or second.startswith(first)


def _allowed(kind: Any) -> str:
    if _is_section(kind):
        return f"a mapping with the keys {', '.join(kind.model_fields)}"
    return describe(_adapter(kind).json_schema())


def _hint(kind: Any, value: Any) -> str:
    """Suggest the nearest choice, or the quotes to add or remove."""
    if _is_section(kind):
        defaults = "write {}" if kind is MethodSpace else "leave the key out"
        return f"{defaults} to take the defaults" if value is None else ""
    adapter = _adapter(kind)
    if isinstance(value, str):
        choices: list[Any] = []
        for branch in _branches(kind):
            if get_origin(branch) is Literal:
                choices += get_args(branch)
        near = nearest(value, [word for word in choices if isinstance(word, str)])
        if near:
            return f"did you mean {near}?"
        plain = unquoted(value)
        return "remove the quotes" if plain is not None and _accepts(adapter, plain) else ""
    quoted = isinstance(value, bool | int | float) and _accepts(adapter, json.dumps(value))
    return "put it in quotes" if quoted else ""
