"""The command line itself, to which each module of verbs adds its own."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator import __version__
from orchestrator.cli.output import out

app = typer.Typer(
    name="orchestrator",
    help="Search, register and serve soft prompts for one frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def version(show: bool) -> None:
    if show:
        out(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Search, register and serve soft prompts for one frozen language model."""
