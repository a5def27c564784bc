"""Read a job spec from YAML and report every problem at once, each with its place.

Three steps: ``_Tree`` turns the text into plain values and remembers where each one stands, ``_set`` lays the
``--set`` overrides over them, ``_check`` compares the result with the models of ``spec``.

Scalars are read as YAML 1.2's core schema reads them, so ``no`` is text and ``1e-3`` a number; hexadecimal, octal and
numbers with leading zeros stay text. Tags that make objects are refused.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from .errors import Problem, SpecError
from .spec import NAME_PATTERN, Conflict, JobSpec, Section

MAX_BYTES = 2**20  # a job spec is a page of text; more is some other file
MAX_NODES = 100_000  # aliases of aliases can stand for more values than a machine can hold
MAX_DEPTH = 50

Key = tuple[Any, ...]  # mapping keys and Index values from the root


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job spec in the YAML file ``path``, with ``overrides`` of the form ``a.b.c=VALUE`` laid over it in order.

    VALUE is YAML on one line: a scalar, ``[a, b]`` or ``{a: b}``. Parts of the key are separated by dots; a part with
    dots of its own, or a number that is meant as text, stands in double quotes: ``data.rename."a.b"=text``. Mappings on
    the way are made, in place of a scalar too; a list is only set as a whole.

    Raises SpecError with all problems of the file and of the overrides.
    """
    file = _printable(str(path))
    text = _text(path, file)
    tree = _parse(text, file)
    for override in overrides:
        _set(tree, override)
    return _check(tree)


class Index(int):
    """Position in a list, as a part of a key; a plain int is a mapping's key."""


@dataclass(frozen=True)
class _Place:
    """Where a value and its key stand; without lines for a value from --set."""

    file: str
    line: int | None = None
    key_line: int | None = None


@dataclass(frozen=True)
class _Finding:
    """A problem before its place is looked up."""

    key: Key
    message: str
    hint: str = ""
    place: _Place | None = None  # already known: found while reading
    at_key: bool = False  # the key is wrong, not its value
    meant: Key | None = None  # the known key that an unknown one probably stands for
    reads: tuple[Key, ...] = ()  # other keys that a check across keys looked at


def _refuse(file: str, message: str, hint: str = "", line: int | None = None) -> SpecError:
    return SpecError([Problem(file, line, "", message, hint)])


# -- the file ---------------------------------------------------------------------------------------------------------


def _text(path: str | Path, file: str) -> str:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = _nearest(Path(path).name, _siblings(path))
        hint = f"did you mean {Path(path).with_name(near)}?" if near else "orchestrator init writes one to start from"
        raise _refuse(file, "there is no such file", hint) from None
    except IsADirectoryError:
        raise _refuse(file, "is a folder; name the job spec in it") from None
    except (OSError, ValueError) as error:
        raise _refuse(file, f"can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise _refuse(file, f"is larger than {MAX_BYTES} bytes; this is no job spec")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _refuse(file, f"is not UTF-8 text: byte 0x{raw[error.start]:02x}", "save it as UTF-8", line) from None


def _siblings(path: str | Path) -> list[str]:
    try:
        return [entry.name for entry in Path(path).parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return []


# -- YAML to values with places ---------------------------------------------------------------------------------------

TAG = "tag:yaml.org,2002:"
SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"null|Null|NULL|~|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", int),
    "float": (
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    ),
    "str": (r"(?s:.*)", str),
}


class _Resolver(BaseResolver):
    """Which plain scalars are not text."""


for _name in ("null", "bool", "int", "float"):
    # The key None means any first letter.
    _Resolver.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{SCALARS[_name][0]})\Z"), [None])


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """YAML text to a node tree; nothing here makes objects."""

    def __init__(self, stream: str) -> None:
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)


def _compose(text: str) -> yaml.Node | None:
    """Raises yaml.YAMLError; RecursionError for a file of brackets."""
    node: yaml.Node | None = _Loader(text).get_single_node()
    return node


def _parse(text: str, file: str) -> _Tree:
    try:
        node = _compose(text)
        if node is None:
            raise _refuse(file, "is empty", "orchestrator init writes a job spec to start from")
        if not isinstance(node, yaml.MappingNode):
            raise _refuse(file, "is not a job spec: a mapping of keys to values", "start with name: my-search", 1)
        tree = _Tree(file)
        tree.data = tree.value(node, (), node.start_mark.line + 1)
        return tree
    except yaml.YAMLError as error:
        message, line = _syntax(error, text)
        hint = "indent with spaces, not tabs" if "\\t" in message else ""
        raise _refuse(file, f"is not valid YAML: {message}", hint, line) from None
    except (RecursionError, _Oversized) as error:
        raise _refuse(file, _oversize(error)) from None


def _oversize(error: Exception) -> str:
    return str(error) if isinstance(error, _Oversized) else "is nested too deeply for a job spec"


def _syntax(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.problem, error.context) if part]
        return ", ".join(parts), mark.line + 1 if mark else None
    if isinstance(error, ReaderError):
        return f"character U+{_code(error.character):04X} is not allowed", text.count("\n", 0, error.position) + 1
    return str(error), None


def _code(character: int | str | bytes) -> int:
    return character if isinstance(character, int) else ord(character)


class _Oversized(Exception):
    """Valid YAML that stands for more than a job spec can hold."""


class _Tree:
    """Plain values, the place of each, and what was wrong with the text itself."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.data: Any = None
        self.places: dict[Key, _Place] = {}
        self.findings: list[_Finding] = []
        self.broken: set[Key] = set()  # keys whose value could not be read: nothing more is said about them
        self._numbered = True
        self._nodes = 0
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: Key, key_line: int) -> Any:
        """The value of ``node``, with its place and its problems noted under ``key``."""
        self._count()
        # A block mapping or list starts below its key: the key's line is the one to look at.
        line = node.start_mark.line + 1 if isinstance(node, yaml.ScalarNode) else key_line
        self.places[key] = self._place(line, key_line)
        if self._inside(node):
            return self._break(key, "is an alias of a value that holds it; write the value out")
        self._enter(node)
        try:
            return self._read(node, key)
        finally:
            self._open.pop()

    def override(self, text: str, node: yaml.Node, key: Key) -> Any:
        """The value of an override; every place in it is the override."""
        file, self.file, self._numbered = self.file, _source(text), False
        try:
            return self.value(node, key, 0)
        finally:
            self.file, self._numbered = file, True

    def place(self, key: Key) -> _Place:
        """Where ``key`` stands, or the nearest mapping around it that stands somewhere."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, _Place(self.file))

    def _place(self, line: int, key_line: int) -> _Place:
        return _Place(self.file, line, key_line) if self._numbered else _Place(self.file)

    def _break(self, key: Key, message: str) -> None:
        self.broken.add(key)
        self.findings.append(_Finding(key, message, place=self.places[key]))

    def _read(self, node: yaml.Node, key: Key) -> Any:
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.ScalarNode) and kind in SCALARS:
            return self._scalar(node, kind, key)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [
                self.value(child, (*key, Index(i)), child.start_mark.line + 1) for i, child in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, key)
        return self._break(key, f"has the tag {node.tag.replace(TAG, '!!')}; a job spec takes plain values only")

    def _scalar(self, node: yaml.ScalarNode, kind: str, key: Key) -> Any:
        pattern, convert = SCALARS[kind]
        if not re.fullmatch(pattern, node.value):
            return self._break(key, f"{_show(node.value)} does not fit its tag !!{kind}")
        try:
            return convert(node.value)
        except ValueError:  # Python refuses integers of thousands of digits
            return self._break(key, f"{_show(node.value)} is too long for a number")

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        first: dict[Any, int] = {}
        for name_node, value_node, merged in self._pairs(node, key):
            line = name_node.start_mark.line + 1
            name = self._name(name_node, key)
            if name is None or (merged and name in values):
                continue
            inner = (*key, name)
            if name in first:
                self.forget(inner)
                text = f"is given twice, first on line {first[name]}" if self._numbered else "is given twice"
                self.findings.append(_Finding(inner, text, "keep one", self._place(line, line)))
            first.setdefault(name, line)
            values[name] = self.value(value_node, inner, line)
        return {name: value for name, value in values.items() if (*key, name) not in self.broken}

    def _pairs(self, node: yaml.MappingNode, key: Key) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Keys and values of a mapping, its own first, then those that ``<<`` merges in and that stand behind them."""
        for name, value in node.value:
            if not _is_merge(name):
                yield name, value, False
        self._enter(node)
        for name, value in node.value:
            if _is_merge(name):
                for source in self._sources(name, value, key):
                    yield from ((inner, below, True) for inner, below, _ in self._pairs(source, key))
        self._open.pop()

    def _sources(self, name: yaml.Node, value: yaml.Node, key: Key) -> Iterator[yaml.MappingNode]:
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            self._count()
            if isinstance(source, yaml.MappingNode) and not self._inside(source):
                yield source
                continue
            line = name.start_mark.line + 1
            text = "<< takes an alias of another mapping, or a list of them"
            self.findings.append(_Finding(key, text, "", self._place(line, line)))

    def _enter(self, node: yaml.Node) -> None:
        if len(self._open) == MAX_DEPTH:
            raise _Oversized("is nested too deeply for a job spec")
        self._open.append(node)

    def _inside(self, node: yaml.Node) -> bool:
        return any(node is parent for parent in self._open)

    def _count(self) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Oversized(f"holds more than {MAX_NODES} values, aliases counted each time")

    def _name(self, node: yaml.Node, key: Key) -> Any:
        """A mapping's key; None for one that can't be a key, which is then noted."""
        line = node.start_mark.line + 1
        name = None
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(TAG) in SCALARS:
            kind = node.tag.removeprefix(TAG)
            name = self._scalar(node, kind, key) if kind != "null" else None
        if name is None and key not in self.broken:
            shown = _show(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
            self.findings.append(
                _Finding(key, f"{shown} can't be a key; write text in quotes", "", self._place(line, line))
            )
        return name

    def forget(self, key: Key) -> None:
        """Drop what is known about ``key`` and all below it, because another value takes its place."""
        self.places = {known: place for known, place in self.places.items() if known[: len(key)] != key}
        self.broken = {known for known in self.broken if known[: len(key)] != key}


def _is_merge(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "<<" and node.style is None


# -- overrides --------------------------------------------------------------------------------------------------------

PART = r'(?:"[^"]*"|[^."=]+)'
OVERRIDE = re.compile(rf"({PART}(?:\.{PART})*)=(.*)", re.DOTALL)


def _source(override: str) -> str:
    """What stands in for a file's name in a problem with an override."""
    return _printable(f"--set {override}")


def _set(tree: _Tree, override: str) -> None:
    """Lay one ``a.b.c=VALUE`` over the tree."""
    place = _Place(_source(override))

    def note(message: str, hint: str = "", key: Key = ()) -> None:
        if key:
            tree.broken.add(key)  # its value is unknown now: judge nothing that depends on it
        tree.findings.append(_Finding(key, message, hint, place))

    match = OVERRIDE.fullmatch(override)
    if not match:
        note("names no key" if "=" in override else "has no =", "write --set key=value, for instance train.steps=100")
        return
    key = tuple(_part(part) for part in re.findall(PART, match.group(1)))
    value = match.group(2)
    try:
        node = _compose(value) or yaml.ScalarNode(TAG + "null", "", _START, _START)
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            note("the value is neither a scalar nor [a, b] nor {a: b}", _quoting(match), key)
        else:
            _put(tree, key, override, node, note)
    except yaml.YAMLError as error:
        note(f"the value is not valid YAML: {_syntax(error, value)[0]}", _quoting(match), key)
    except (RecursionError, _Oversized) as error:
        note(f"the value {_oversize(error)}", "", key)


_START = yaml.Mark("", 0, 0, 0, None, 0)


def _quoting(match: re.Match[str]) -> str:
    return f"put text in quotes: --set '{match.group(1)}={json.dumps(match.group(2), ensure_ascii=False)}'"


def _part(text: str) -> Any:
    """One part of an override's key: text in quotes, otherwise read as YAML reads a key (verbalizer.0 is a number)."""
    if text.startswith('"'):
        return text[1:-1]
    value = _plain(text)
    return text if value is None else value


def _plain(text: str) -> Any:
    """The number or truth value that ``text`` is without quotes; None for text."""
    for kind in ("bool", "int", "float"):
        if re.fullmatch(SCALARS[kind][0], text):
            try:
                return SCALARS[kind][1](text)
            except ValueError:
                return None
    return None


def _put(tree: _Tree, key: Key, override: str, node: yaml.Node, note: Callable[..., None]) -> None:
    around = tree.data
    for depth, part in enumerate(key[:-1], start=1):
        inner = around.get(part)
        if isinstance(inner, list):
            note(f"{_dotted(key[:depth])} is a list; set it as a whole", "", key)
            return
        if not isinstance(inner, dict):
            inner = around[part] = {}
            tree.forget(key[:depth])
            tree.places[key[:depth]] = _Place(_source(override))
        around = inner
    tree.forget(key)
    around[key[-1]] = tree.override(override, node, key)
    if key in tree.broken:
        del around[key[-1]]


# -- values against the models ----------------------------------------------------------------------------------------


def _check(tree: _Tree) -> JobSpec:
    """The tree as a JobSpec.

    Raises SpecError with everything found while reading, in the values and across them.
    """
    if not tree.findings:
        try:
            return JobSpec.model_validate(tree.data)
        except ValidationError:
            pass  # explained below, in words of our own
    explained = [found for found in _explain(JobSpec, tree.data, ()) if not _touches(found.key, tree.broken)]
    suspects = {_field(key) for key in (*tree.broken, *(found.key for found in explained))}
    suspects |= {found.meant for found in explained if found.meant}
    findings = [*tree.findings, *explained, *_across(tree.data, suspects)]
    problems = dict.fromkeys(_problem(tree, found) for found in findings)
    # Lines first and in order, then what came from --set.
    raise SpecError(sorted(problems, key=lambda problem: (problem.file != tree.file, problem.line or 0)))


def _problem(tree: _Tree, found: _Finding) -> Problem:
    # A check across keys may concern one that is only a default: then point at the one that was written.
    key = next((key for key in (found.key, *found.reads) if key in tree.places), found.key)
    place = found.place or tree.place(key)
    missing = found.place is None and key not in tree.places
    line = place.key_line if found.at_key or missing else place.line
    return Problem(place.file, line, _dotted(found.key), found.message, found.hint)


def _touches(key: Key, others: Iterable[Key]) -> bool:
    """Whether ``key`` is one of the others, or inside one, or around one."""
    return any(key[: len(other)] == other[: len(key)] for other in others)


EXACT = ConfigDict(strict=True, allow_inf_nan=False)  # as Section has it; a part of a section is checked on its own


def _explain(kind: Any, value: Any, key: Key) -> Iterator[_Finding]:
    """What keeps ``value`` from being a ``kind``, at the innermost key that is to blame; nothing for a good value."""
    if _is_section(kind):
        yield from _explain_section(kind, value, key)
        return
    message = _refusal(TypeAdapter(kind, config=EXACT), value)
    if message is None:
        return
    inner = list(_explain_parts(kind, value, key))
    if inner:
        yield from inner
    else:
        options = _options(kind)
        text = message or f"{_show(value)} is not allowed; allowed: {_listed(options.texts)}"
        yield _Finding(key, text, _value_hint(kind, options, value))


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _refusal(adapter: TypeAdapter[Any], value: Any) -> str | None:
    """None for a good value, else what the value's own check said of it; "" when its type or size is wrong."""
    try:
        adapter.validate_python(value)
        return None
    except ValidationError as error:
        own = [detail for detail in error.errors() if detail["type"] == "value_error"]
        return f"{_show(value)} {own[0]['ctx']['error']}" if own else ""


def _explain_section(section: type[Section], value: Any, key: Key) -> Iterator[_Finding]:
    fields = section.model_fields
    if not isinstance(value, dict):
        hint = "leave the key out to take the defaults" if value is None else ""
        text = f"{_show(value)} is not allowed; allowed: a mapping with the keys {', '.join(fields)}"
        yield _Finding(key, text, hint)
        return
    meant = set()
    for name in value:
        if name in fields:
            yield from _explain(fields[name].rebuild_annotation(), value[name], (*key, name))
        else:
            found = _unknown(section, name, key, value)
            meant.add(found.meant)
            yield found
    for name, field in fields.items():
        # A required key that is there under a wrong name is one mistake, not two.
        if field.is_required() and name not in value and (*key, name) not in meant:
            allowed = _listed(_options(field.rebuild_annotation()).texts)
            yield _Finding((*key, name), f"is missing; allowed: {allowed}", field.description or "")


def _unknown(section: type[Section], name: Any, key: Key, value: dict[Any, Any]) -> _Finding:
    fields = list(section.model_fields)
    near = _nearest(str(name), [field for field in fields if field not in value]) or _nearest(str(name), fields)
    if near:
        hint, meant = f"did you mean {near}? ", (*key, near)
    else:
        elsewhere = [_dotted(known) for known in _known_keys(JobSpec) if known[-1] == name]
        hint, meant = (f"did you mean {' or '.join(elsewhere)}? " if elsewhere else ""), None
    return _Finding((*key, name), "unknown key", f"{hint}allowed: {', '.join(fields)}", at_key=True, meant=meant)


def _known_keys(section: type[Section], key: Key = ()) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        yield (*key, name)
        if _is_section(field.annotation):
            yield from _known_keys(field.annotation, (*key, name))


def _explain_parts(kind: Any, value: Any, key: Key) -> Iterator[_Finding]:
    """What is wrong inside a list or a mapping, by the branch of ``kind`` that the value was meant for."""
    branches = list(_branches(kind))
    if isinstance(value, dict):
        section = _meant_section([branch for branch in branches if _is_section(branch)], value)
        if section:
            yield from _explain_section(section, value, key)
    for branch in branches:
        arguments = get_args(branch)
        if isinstance(value, dict) and get_origin(branch) is dict:
            yield from _explain_items(arguments, value, key)
        elif isinstance(value, list) and get_origin(branch) is list:
            for index in _failing(arguments[0], value):
                yield from _explain(arguments[0], value[index], (*key, Index(index)))
        elif isinstance(value, list) and get_origin(branch) is tuple and len(value) == len(arguments):
            for index, (inner, item) in enumerate(zip(arguments, value, strict=True)):
                yield from _explain(inner, item, (*key, Index(index)))


def _branches(kind: Any) -> Iterator[Any]:
    """The alternatives of a union, the one of anything else, without annotations."""
    if get_origin(kind) is Annotated:
        yield from _branches(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for branch in get_args(kind):
            yield from _branches(branch)
    else:
        yield kind


def _meant_section(sections: Sequence[type[Section]], value: dict[Any, Any]) -> type[Section] | None:
    """The section that shares a key with the value, or nearly does."""
    for section in sections:
        if any(name in value for name in section.model_fields):
            return section
    for section in sections:
        if any(_nearest(str(name), list(section.model_fields)) for name in value):
            return section
    return None


def _failing(kind: Any, values: Sequence[Any]) -> Iterator[int]:
    # One adapter for all of them: a verbalizer may hold thousands of labels.
    adapter = TypeAdapter(kind, config=EXACT)
    return (index for index, value in enumerate(values) if _refusal(adapter, value) is not None)


def _explain_items(kinds: tuple[Any, ...], value: dict[Any, Any], key: Key) -> Iterator[_Finding]:
    names, values = list(value), list(value.values())
    for index in _failing(kinds[0], names):
        text = f"{_show(names[index])} is not allowed as a key; allowed: {_listed(_options(kinds[0]).texts)}"
        yield _Finding((*key, names[index]), text, _value_hint(kinds[0], _options(kinds[0]), names[index]), at_key=True)
    for index in _failing(kinds[1], values):
        yield from _explain(kinds[1], values[index], (*key, names[index]))


# -- checks across keys -----------------------------------------------------------------------------------------------

# The smallest job; stands in for required keys that are missing, so that the checks across the other keys still run.
SKELETON: dict[str, Any] = {
    "name": "x",
    "base_model": {"id": "x"},
    "data": {"path": "x", "template": "{text}", "target": "x"},
}


def _across(data: Any, suspects: set[Key]) -> Iterator[_Finding]:
    """Conflicts between keys that are each good. ``suspects`` are bad already; what depends on them is not judged.

    A section with conflicts hides those of the sections around it: they are taken out and the rest is checked again.
    """
    suspects = set(suspects)
    while True:
        try:
            JobSpec.model_validate(_without(data, suspects))
            return
        except ValidationError as error:
            fresh = [found for found in _conflicts(error) if not _touches(found.key, suspects)]
        before = len(suspects)
        yield from (found for found in fresh if not any(_touches(key, suspects) for key in found.reads))
        suspects.update(key for found in fresh for key in (found.key, *found.reads))
        if len(suspects) == before:
            return


def _conflicts(error: ValidationError) -> Iterator[_Finding]:
    for detail in error.errors():
        section = detail["loc"]
        if detail["type"] != "conflict":  # nothing that _explain knows of; better said badly than not at all
            yield _Finding(section, f"{_show(detail['input'])} is not allowed: {detail['msg']}")
            continue
        conflicts: tuple[Conflict, ...] = detail["ctx"]["conflicts"]
        for where, message, reads in conflicts:
            keys = tuple((*section, *read.split(".")) for read in reads)
            yield _Finding((*section, *where.split(".")), message, reads=keys)


def _without(data: Any, keys: Iterable[Key]) -> dict[str, Any]:
    """A copy of ``data`` without ``keys``, filled up from SKELETON."""
    kept = copy.deepcopy(data) if isinstance(data, dict) else {}
    for key in keys:
        around: Any = kept
        for part in key[:-1]:
            around = around.get(part) if isinstance(around, dict) else None
        if isinstance(around, dict) and key:
            around.pop(key[-1], None)
    _fill(kept, SKELETON)
    return kept


def _fill(data: dict[str, Any], skeleton: dict[str, Any]) -> None:
    for name, value in skeleton.items():
        inner = data.setdefault(name, copy.deepcopy(value))
        if isinstance(value, dict) and isinstance(inner, dict):
            _fill(inner, value)


def _field(key: Key) -> Key:
    """The part of ``key`` down to a model's field: what can be taken out without leaving half a value."""
    section: type[Section] = JobSpec
    for depth, part in enumerate(key, start=1):
        field = section.model_fields.get(part)
        if field is None or not _is_section(field.annotation):
            return key[:depth]
        section = field.annotation
    return key


# -- words ------------------------------------------------------------------------------------------------------------


def _nearest(word: str, words: Iterable[str]) -> str:
    lowered = {known.lower(): known for known in words}
    found = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else ""


def _show(value: Any) -> str:
    """A value as it would stand in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _printable(text if len(text) <= 60 else f"{text[:57]}...")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        if isinstance(part, Index):
            text += f"[{int(part)}]"
        else:
            name = part if isinstance(part, str) and "." not in part else json.dumps(part, ensure_ascii=False)
            text += f".{name}" if text else name
    return _printable(text)


class _Options(NamedTuple):
    texts: list[str]  # each alternative in words
    choices: list[str]  # the words that are allowed as they are


def _options(kind: Any) -> _Options:
    """What a ``kind`` allows, taken from its JSON schema so that no limit is written down twice."""
    if _is_section(kind):
        return _Options([f"a mapping with the keys {', '.join(kind.model_fields)}"], [])
    schema = TypeAdapter(kind, config=EXACT).json_schema()
    texts = list(dict.fromkeys(_describe(schema, schema.get("$defs", {}))))
    return _Options(texts, [text for branch in _alternatives(schema) for text in map(str, branch.get("enum", ()))])


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [inner for branch in schema["anyOf"] for inner in _alternatives(branch)] if "anyOf" in schema else [schema]


def _describe(schema: dict[str, Any], models: dict[str, Any]) -> list[str]:
    texts: list[str] = []
    for alternative in _alternatives(schema):
        branch = models[alternative["$ref"].rsplit("/", 1)[-1]] if "$ref" in alternative else alternative
        if "enum" in branch:
            texts += map(str, branch["enum"])
        elif "prefixItems" in branch:
            texts.append("[low, high]")  # ranges are the only lists of fixed length
        elif branch.get("type") == "array":
            inner = _describe(branch.get("items", {}), models)
            texts.append("a list of them" if inner == texts else f"a list of {_listed(inner)}")
        else:
            texts.append(_describe_one(branch))
    return texts


def _describe_one(branch: dict[str, Any]) -> str:
    if "const" in branch:
        return str(branch["const"])
    match branch.get("type"):
        case "integer" | "number":
            return _describe_number(branch)
        case "string" if branch.get("pattern") == NAME_PATTERN:
            return "letters, digits, '.', '_' and '-', a letter or digit first, 100 at most"
        case "string":
            return "text that is not empty" if branch.get("minLength") else "text"
        case "boolean":
            return "true or false"
        case "object" if "properties" in branch:
            parts = (f"{name}: {_short(inner)}" for name, inner in branch["properties"].items())
            return f"{{{', '.join(parts)}}}"
        case "object":
            return f"a mapping to {_listed(_describe(branch.get('additionalProperties', {}), {}))}"
    return str(branch.get("type", "a value"))


def _short(schema: dict[str, Any]) -> str:
    return "[low, high]" if "prefixItems" in schema else "..."


def _describe_number(branch: dict[str, Any]) -> str:
    noun = "a whole number" if branch["type"] == "integer" else "a number"
    least, above = branch.get("minimum"), branch.get("exclusiveMinimum")
    most, below = branch.get("maximum"), branch.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f"{noun} from {least:g} to {most}"
    if above is not None and below is not None:
        return f"{noun} between {above:g} and {below:g}"
    if least is not None:
        return f"{noun} of at least {least:g}"
    return f"{noun} above {above:g}" if above is not None else noun


def _listed(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else "".join(texts)


def _value_hint(kind: Any, options: _Options, value: Any) -> str:
    """The nearest choice, or the quotes that are missing or too many."""
    adapter = TypeAdapter(kind, config=EXACT)
    if isinstance(value, str):
        near = _nearest(value, options.choices)
        if near:
            return f"did you mean {near}?"
        plain = _plain(value)
        return "remove the quotes" if plain is not None and _refusal(adapter, plain) is None else ""
    quoted = isinstance(value, bool | int | float) and _refusal(adapter, json.dumps(value)) is None
    return "put it in quotes" if quoted else ""
