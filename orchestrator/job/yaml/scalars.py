"""Parse YAML text to PyYAML's nodes, with scalars as in YAML 1.2's core schema.

``no`` is text and ``1e-3`` is a number. Hexadecimal, octal and numbers with leading zeros stay
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeGuard

import yaml
from yaml.reader import ReaderError

TOO_DEEP = "is nested too deeply for a job spec"
PLAIN = "plain"  # our tag for a scalar that has neither quotes nor a tag
TEXT = "tag:yaml.org,2002:str"
SCALARS: list[tuple[str, Callable[[str], Any]]] = [
    (r"null|Null|NULL|~|", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    # The length is limited because Python refuses to convert thousands of digits.
    (r"[-+]?(?:0|[1-9][0-9]{0,999})", int),
    (r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", float),
    (r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
]


class Unreadable(Exception):
    """Text that no job spec can hold.

    The message continues a sentence that starts with the text's name, as in "is not valid YAML".
    """

    def __init__(self, message: str, line: int | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.line = line
        self.hint = hint


class _Loader(yaml.BaseLoader):
    """A loader that makes nodes only, never objects."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Return the tag of a node that has none."""
        plain = kind is yaml.ScalarNode and implicit[0]
        return PLAIN if plain else super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


def compose(text: str) -> yaml.Node | None:
    """Return the only document in ``text``, or None when there is none. Raises Unreadable."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
        return node
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(
            f"is not valid YAML: character U+{error.character:04X} is not allowed", line
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(part for part in (error.problem, error.context) if part)
        hint = "indent with spaces, not tabs" if "\\t" in words else ""
        raise Unreadable(
            f"is not valid YAML: {words}", mark.line + 1 if mark else None, hint
        ) from None
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except (ValueError, OverflowError) as error:  # PyYAML raises them for "\UFFFFFFFF" and the like
        raise Unreadable(f"is not valid YAML: {error}") from None


def is_scalar(node: yaml.Node) -> TypeGuard[yaml.ScalarNode]:
    """Tell whether ``node`` is a scalar without a tag that would change its type."""
    return isinstance(node, yaml.ScalarNode) and node.tag in (PLAIN, TEXT)


def scalar(node: yaml.ScalarNode) -> Any:
    """Return the value of a scalar."""
    return unquoted(node.value) if node.tag == PLAIN else node.value


def unquoted(text: str) -> Any:
    """Return the number, truth value, null or text that ``text`` stands for without quotes."""
    return next(
        (convert(text) for pattern, convert in SCALARS if re.fullmatch(pattern, text)), text
    )


class _Dumper(yaml.SafeDumper):
    """A dumper whose YAML this module reads back unchanged."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML takes 1e3 for text and would write it without quotes, which this module would read as a
    # number. In single quotes PyYAML loses characters such as U+0085.
    is_bare = unquoted(text) == text and text.isprintable()
    return dumper.represent_scalar(TEXT, text, style=None if is_bare else '"')


_Dumper.add_representer(str, _text_node)


def write(document: Any) -> str:
    """Write a job spec's document as YAML."""
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
