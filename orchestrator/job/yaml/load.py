"""Load a JobSpec from a path and overrides, or report all problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from orchestrator.errors import Problem, SpecError
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml.explain import explain
from orchestrator.job.yaml.overrides import lay_over
from orchestrator.job.yaml.places import Places
from orchestrator.job.yaml.scalars import Unreadable, compose
from orchestrator.job.yaml.tree import Node, grow
from orchestrator.job.yaml.wording import encodable
from orchestrator.utils.text import nearest

MAX_BYTES = 2**20  # a job spec is a page of text; a larger file is something else


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Load the job spec in the YAML file ``path``, with ``overrides`` applied in order.

    An override has the form ``a.b.c=VALUE``. VALUE is YAML on one line: a scalar, ``[a, b]`` or
    ``{a: b}``. Dots separate the parts of the key. A part that contains dots, or a number that is
    meant as text, stands in double quotes: ``data.rename."a.b"=text``. Missing mappings on the way
    are created, and replace a scalar that stands there. A list can only be set as a whole.

    Raises SpecError with all problems of the file and of the overrides.
    """
    return load_with_places(path, overrides)[0]


def load_with_places(path: str | Path, overrides: Sequence[str] = ()) -> tuple[JobSpec, Places]:
    """Read a job spec as ``load_job`` does; return it with the lines of its values."""
    file = encodable(str(path))
    try:
        root = _tree(_text(Path(path)), file)
    except Unreadable as error:
        raise SpecError([Problem(file, error.line, "", str(error), error.hint)]) from None
    for override in overrides:
        lay_over(root, override)
    return checked(root), Places(root)


def checked(root: Node) -> JobSpec:
    """Return the job spec that a tree holds. Raises SpecError with all problems of the tree."""
    problems = [*root.found(), *explain(root)]
    if not problems:
        try:
            return JobSpec.model_validate(root.plain())
        except ValidationError as error:
            # A check that explain does not know: report pydantic's own message.
            problems = [Problem(root.file, None, "", str(error))]
    raise SpecError(Places(root).in_order(problems))


def _tree(text: str, file: str) -> Node:
    node = compose(text)
    if node is None:
        raise Unreadable("is empty", hint="orchestrator init writes a job spec to start from")
    if not isinstance(node, yaml.MappingNode):
        raise Unreadable(
            "is not a job spec: a mapping of keys to values", 1, "start with name: my-search"
        )
    return grow(node, file)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = nearest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")])
        hint = "orchestrator init writes one to start from"
        if near:
            hint = f"did you mean {path.with_name(near)}?"
        raise Unreadable("there is no such file", hint=hint) from None
    except IsADirectoryError:
        raise Unreadable("is a folder; name the job spec in it") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise Unreadable(f"is larger than {MAX_BYTES} bytes; this is no job spec")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            f"is not UTF-8 text: byte 0x{raw[error.start]:02x}", line, "save it as UTF-8"
        ) from None
