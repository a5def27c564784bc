"""Entry point of the command line: runs a verb, and maps errors to messages and exit codes."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer

from orchestrator.cli import cluster, registry, serve, tune  # noqa: F401  # each adds its verbs
from orchestrator.cli.groups import app
from orchestrator.cli.output import print_json, say
from orchestrator.cluster.ray_threads import end_ray_process
from orchestrator.errors import (
    TRACEBACK,
    BadInput,
    Interrupted,
    OrchestratorError,
    SpecError,
    Unreachable,
)
from orchestrator.utils.interrupts import Interrupts, ignore_interrupts
from orchestrator.utils.text import first_line

INTERRUPTED = 130  # typer turns Ctrl-C into an exit with this code
TERMINATED = 143  # after SIGTERM; as in shells, both codes are 128 plus the signal's number


def main() -> NoReturn:
    """Run the verb that the command line names, and end the process with its exit code."""
    code = run_verb()
    ignore_interrupts()  # the outcome is printed: another signal must not change the exit code
    end_ray_process(code)


def run_verb() -> int:
    """Run the verb that the command line names, and return the exit code."""
    return _guarded(lambda: app(prog_name="orchestrator", standalone_mode=False))


def _guarded(verb: Callable[[], object]) -> int:
    with Interrupts() as interrupts:
        try:
            result = verb()
            code = result if isinstance(result, int) else 0
            if code == INTERRUPTED:
                return _interrupted(interrupts)
            interrupts.over()
            return code
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted(interrupts)
        except Interrupted as error:
            return _interrupted(interrupts, error.hint, error.message)
        except OrchestratorError as error:
            interrupts.over()
            return _failed(error)
        except Exception as error:
            interrupts.over()
            # Some versions of typer bundle a copy of click, so isinstance can't tell usage errors.
            # Only they have a method ``show``.
            if callable(show := getattr(error, "show", None)):
                show()
                return _document("failed", str(error), "orchestrator --help", BadInput.exit_code)
            return _unforeseen(error)


def _failed(error: OrchestratorError) -> int:
    problems = [vars(problem) for problem in error.problems] if isinstance(error, SpecError) else []
    kind = {BadInput.exit_code: "bad input", Unreachable.exit_code: "unreachable"}.get(
        error.exit_code, "failed"
    )
    say(f"{kind}: {error}" if not isinstance(error, SpecError) else str(error))
    return _document("failed", error.message, error.hint, error.exit_code, problems)


def _unforeseen(error: Exception) -> int:
    """Report an unexpected error in one line; print the traceback only if it is asked for.

    The environment variable that asks for it is named by ``TRACEBACK``.
    """
    import traceback

    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    text = first_line(error, with_type=True)
    return _failed(
        OrchestratorError(
            f"an unforeseen error, please report it: {text}", f"{TRACEBACK}=1 shows where it arose"
        )
    )


def _interrupted(interrupts: Interrupts, resume: str = "", message: str = "interrupted") -> int:
    """Report an interrupt with the command to continue with, and return the exit code.

    ``resume`` is that command. Without it nothing was saved, and the same command starts over.
    """
    interrupts.over()
    again = resume or shlex.join(["orchestrator", *sys.argv[1:]])
    say(f"{message}\n  next: {again}   {'goes on' if resume else 'starts over'}")
    code = TERMINATED if interrupts.received == signal.SIGTERM else INTERRUPTED
    return _document("interrupted", message, again, code)


def _document(
    status: str, message: str, hint: str, code: int, problems: Sequence[object] = ()
) -> int:
    """Print the failure as a JSON document if ``--json`` was given. Returns the exit code."""
    if "--json" in sys.argv[1:]:
        error = {"message": message, "next": hint, "problems": list(problems), "exit_code": code}
        print_json({"status": status, "error": error})
    return code
