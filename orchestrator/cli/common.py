"""Steps that most verbs share: read the job, open the registry, show progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.output import present, say
from orchestrator.utils.documents import JsonObject

if TYPE_CHECKING:
    from orchestrator.cli.progress import ConsoleProgress
    from orchestrator.job.spec import JobSpec
    from orchestrator.registry import Registry
    from orchestrator.search.inputs import Inputs


def read_job(file: Path, overrides: list[str]) -> JobSpec:
    """Read a job spec and apply the values of ``--set``.

    Raises SpecError, which lists every problem.
    """
    from orchestrator.job.yaml import load_job

    return load_job(file, overrides)


def read_checked(
    file: Path, overrides: list[str], *, elsewhere: bool = False
) -> tuple[JobSpec, Inputs]:
    """Read a job spec as ``read_job`` does, and check the files and folders that it names.

    With ``elsewhere``, an absolute path that does not exist on this machine is taken to exist on
    the cluster. Raises SpecError, which lists every problem.
    """
    from orchestrator.search.inputs import load_checked

    return load_checked(file, overrides, elsewhere=elsewhere)


def repeated(overrides: list[str]) -> str:
    """Format the ``--set`` options for a command that the user can paste into a shell."""
    return "".join(f" --set {shlex.quote(override)}" for override in overrides)


def open_registry() -> Registry:
    """Open the registry that the environment names. Raises Unreachable if it does not answer."""
    from orchestrator.registry import Registry

    return Registry.connect()


def progress_line(quiet: bool, text: str = "{}") -> Callable[[str], None]:
    """Return a function that prints a line, formatted by ``text``, on standard error.

    With ``--quiet`` the function prints nothing.
    """
    if quiet:
        return lambda line: None
    return lambda line: say(text.format(line))


def console_progress(quiet: bool = False) -> Callable[[JobSpec], ConsoleProgress]:
    """Return a function that makes a progress display, on standard error, for a job's search."""
    from rich.console import Console

    from orchestrator.cli.progress import ConsoleProgress

    console = Console(stderr=True)
    return lambda job: ConsoleProgress(job, console, quiet)


def present_search(document: JsonObject, job: JobSpec, as_json: bool) -> None:
    """Print the result of a finished search."""
    from orchestrator.cli.pages.search import run_summary

    present(document, as_json, lambda: run_summary(document, job))
