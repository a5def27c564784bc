"""Errors of a search that name the command which continues it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import BadInput, Interrupted, JobFailed, NothingFound, Unreachable
from orchestrator.search.state.folder import SearchFolder
from orchestrator.utils.text import first_line


@contextmanager
def naming_resume(folder: SearchFolder) -> Iterator[None]:
    """Add the command that resumes the search to whatever ends the block early.

    The command is added only once the folder holds a search that can be resumed.
    """
    resume = f"orchestrator resume {folder.id}"
    try:
        yield
    except KeyboardInterrupt as error:
        if folder.description.is_file():
            raise Interrupted(_with_notes("interrupted", error), resume) from None
        raise
    except NothingFound:
        raise
    except (Unreachable, JobFailed) as error:
        if folder.description.is_file():
            message = _with_notes(error.message, error)
            raise type(error)(message, f"{error.hint}; then {resume}") from None
        raise


@contextmanager
def naming_later_registration(folder: SearchFolder) -> Iterator[None]:
    """Add to a refusal of the registry that the search is kept and can be registered later.

    The block registers the result.
    """
    try:
        yield
    except BadInput as error:
        resume = f"orchestrator resume {folder.id}, which registers what the search found"
        hint = f"{error.hint}; then {resume}" if error.hint else resume
        raise BadInput(error.message, hint) from None


def _with_notes(message: str, error: BaseException) -> str:
    """Append to the message the notes on what else went wrong while the search ended."""
    notes = (first_line(note) for note in getattr(error, "__notes__", ()) if note)
    return "; ".join([message, *notes])
