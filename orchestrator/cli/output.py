"""Print results on standard output, and everything else on standard error."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer


def out(text: str = "") -> None:
    """A result, on standard output."""
    typer.echo(text)


def say(text: str) -> None:
    """Anything else, on standard error."""
    typer.echo(text, err=True)


@contextmanager
def results_only() -> Iterator[None]:
    """What libraries and child processes print meanwhile goes to standard error: standard output is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_json(document: Any) -> None:
    out(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def _lines(lines: list[str]) -> None:
    for line in lines:
        out(line)


def _repeated(overrides: list[str]) -> str:
    return "".join(f" --set {shlex.quote(override)}" for override in overrides)
