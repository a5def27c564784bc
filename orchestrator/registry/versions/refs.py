"""References to registered prompts, as users write them.

The forms are ``name``, ``name@alias``, ``name:version`` and MLflow's ``models:/...``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.errors import BadInput
from orchestrator.utils.text import nearest

FORMS = "write name, name@alias, name:version, models:/name@alias or models:/name/version"


class NoSuchVersion(BadInput):
    """The registered model does not have this version, or no longer has it."""


@dataclass(frozen=True)
class ModelRef:
    """A parsed reference; without an alias or a version it means the champion."""

    name: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.alias is not None:
            return printable(f"{self.name}@{self.alias}")
        return printable(self.name if self.version is None else f"{self.name}:{self.version}")


def parse_ref(text: str) -> ModelRef:
    """Parse a reference; raise BadInput that names the accepted forms.

    The last ``@`` or ``:`` separates the parts, because a registered model's name may contain
    either.
    """
    uri = text.startswith("models:/")
    body = text.removeprefix("models:/") if uri else text
    if match := re.fullmatch(r"(.+)@([^@/:]+)", body, re.DOTALL):
        return ModelRef(match[1], alias=match[2])
    if match := re.fullmatch(r"(.+)/([0-9]+)" if uri else r"(.+):([0-9]+)", body, re.DOTALL):
        if version := int(match[2]):
            return ModelRef(match[1], version=version)
    elif body and not uri and body[-1] not in "@:/" and body[0] != "@":
        return ModelRef(body)
    raise BadInput(f"{printable(text)!r} names no registered model", FORMS)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Write a clause that lists the known names, with the closest one as a suggestion.

    Returns an empty string when no names are known.
    """
    names = sorted(known)
    close = nearest(word, names)
    shown = ", ".join(printable(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
    if not names:
        return ""
    return f"did you mean {printable(close)!r}? known: {shown}" if close else f"known: {shown}"


def printable(text: str) -> str:
    """Escape the control, format and other invisible characters of a text.

    MLflow's registry accepts any name.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
