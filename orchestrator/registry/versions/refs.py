"""How a person names a registered prompt: ``name``, ``name@alias``, ``name:version`` or MLflow's ``models:/...``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.errors import BadInput

FORMS = "write name, name@alias, name:version, models:/name@alias or models:/name/version"


class NoSuchVersion(BadInput):
    """A version that a registered model does not have, or has no longer."""


@dataclass(frozen=True)
class ModelRef:
    """A parsed reference; neither alias nor version means the champion."""

    name: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.alias is not None:
            return printable(f"{self.name}@{self.alias}")
        return printable(self.name if self.version is None else f"{self.name}:{self.version}")


def parse_ref(text: str) -> ModelRef:
    """Read a reference; BadInput names the accepted forms.

    The last ``@`` or ``:`` divides, because a registry may hold names with either in them.
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


def nearest(word: str, known: Iterable[str]) -> str:
    """A half sentence that lists what exists, the nearest first; empty when nothing exists."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    shown = ", ".join(printable(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
    return (
        f"did you mean {printable(close[0])!r}? known: {shown}"
        if close
        else f"known: {shown}"
        if names
        else ""
    )


def printable(text: str) -> str:
    """The text with control, format and other invisible characters escaped: a registry accepts any name."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
