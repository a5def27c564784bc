"""Templates: text with a row's columns in braces."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
VIRTUAL = "*"
"""Placeholder in a template's braces for the virtual tokens."""
BLANK = "_"
"""Placeholder in a template's braces for the answer."""


def template_fields(template: str) -> list[str]:
    """Return the contents of a template's braces, in order of appearance.

    Doubled braces stand for literal braces and are skipped.
    """
    return [match.group(1) for match in FIELD.finditer(template) if match.group(1) is not None]


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names in braces, in order of appearance."""
    return [name for name in template_fields(template) if name not in (VIRTUAL, BLANK)]


# The messages of the checks below are predicates: the YAML reader puts the value in front of them,
# as in "<value> names no column".
def _checked_template(template: str) -> str:
    lone = re.search(r"[{}]", FIELD.sub("", template))
    if lone:
        raise ValueError(
            f"has a lone {lone.group()}; write {lone.group() * 2} for a brace, {{text}} for a "
            "column"
        )
    columns = template_columns(template)
    if not columns:
        raise ValueError(
            "names no column; write at least one column in braces, for instance {text}"
        )
    if template_fields(template).count(BLANK) > 1:
        raise ValueError("has more than one blank {_}; an answer has one place")
    if "" in columns:
        raise ValueError(
            "has braces without a column's name; write for instance {text}, or {{}} for the braces"
        )
    return template


def answer_in_input(column: str, key: str) -> str:
    """Say that a template writes the answer into the input; ``key`` names the answer's column."""
    return (
        f"writes {{{column}}} into the input, and {key} says that it is the answer; leave it "
        "out of the template"
    )


Template: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_checked_template)]
