"""The typer application, and the groups of its verbs in the order in which users need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from orchestrator import __version__
from orchestrator.cli.output import out

TUNE = "Tune a prompt"
CLUSTER = "Run on a cluster"
REGISTRY = "Look after registered prompts"
SERVE = "Serve and ask"
GROUPS = (TUNE, CLUSTER, REGISTRY, SERVE)

Verb = TypeVar("Verb", bound=Callable[..., Any])


class GroupedVerbs(TyperGroup):
    """The list of verbs in ``--help``, with one section for each group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections; within a section, verbs are in the order of their module."""
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        width = max(len(name) for name, _ in shown)
        limit = formatter.width - width - 6  # click's margins
        for group in GROUPS:
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in shown
                if getattr(command, "rich_help_panel", None) == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)


app = typer.Typer(
    name="orchestrator",
    cls=GroupedVerbs,
    help="Search, register and serve soft prompts for one frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def verb(group: str, name: str | None = None) -> Callable[[Verb], Verb]:
    """Make the decorated function a verb of ``group``.

    The verb is called ``name``, or as the function. The function's docstring is the help text;
    ``--help`` lists the verb with its first sentence.
    """
    return app.command(name, rich_help_panel=group)


def version(show: bool) -> None:
    """Print the version and exit, if ``--version`` is given."""
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
