"""Functions that print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer


def out(text: str = "") -> None:
    """Print a line of the result, on standard output."""
    typer.echo(text)


def say(text: str) -> None:
    """Print a line that is not part of the result, on standard error."""
    typer.echo(text, err=True)


def print_json(document: Any) -> None:
    """Print a document as JSON, on standard output."""
    out(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def print_lines(lines: Iterable[str]) -> None:
    """Print the lines of a page, on standard output."""
    for line in lines:
        out(line)


def present(
    document: Any, as_json: bool, page: Callable[[], Iterable[str]], aside: str = ""
) -> None:
    """Print a verb's result: the document with ``--json``, otherwise the lines of ``page``.

    ``page`` is called only if its lines are printed. ``aside`` is a line that follows them on
    standard error, where a script that reads the lines does not see it.
    """
    if as_json:
        return print_json(document)
    print_lines(page())
    if aside:
        say(aside)


@contextmanager
def results_only() -> Iterator[None]:
    """Redirect standard output to standard error within the block, for child processes too.

    What libraries print would otherwise mix with the result.
    """
    sys.stdout.flush()
    standard_output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)
