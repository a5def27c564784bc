"""The errors of the project. Each says what is wrong, what is allowed and what to do next.

``exit_code`` is the exit code of the command line: 1 the job failed, 2 bad input, 3 something
needed is unreachable, 130 interrupted.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Environment variable: when it is set, unexpected errors are printed with their traceback.
TRACEBACK = "ORCHESTRATOR_TRACEBACK"


class OrchestratorError(Exception):
    """Base of all errors meant for users: a message, and the next step as ``hint``."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        # Both values are in args, so that the error can be pickled between workers.
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of the error, in place of a page of our source code."""
        if os.environ.get(TRACEBACK):
            return traceback.format_exception(self)
        return [f"{type(self).__name__}: {self}"]


class BadInput(OrchestratorError):
    """The user's input can't be used; it is refused before anything is spent."""

    exit_code = 2


class Unreachable(OrchestratorError):
    """Something needed (a hub, a registry, a cluster, a server) does not answer."""

    exit_code = 3


class JobFailed(OrchestratorError):
    """The job was accepted and then failed."""

    exit_code = 1


class NothingFound(JobFailed):
    """The search has run to its end without a result in any trial; resuming it would not help."""


class SearchLost(JobFailed):
    """Processes that a search depends on died. Its results so far are kept; it can be resumed."""


class Interrupted(OrchestratorError):
    """The user ended the job early; the hint names the command that continues it."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """A single fault in a job spec."""

    file: str
    line: int | None  # 1-based; None when the value came from --set or is missing
    where: str  # dotted key, e.g. "search.space.learning_rate"
    message: str  # describes the fault, with the value and what is allowed
    hint: str = ""  # the nearest known key, or the next step

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        text = (
            f"{place}: {self.where}: {self.message}" if self.where else f"{place}: {self.message}"
        )
        return f"{text} ({self.hint})" if self.hint else text


class SpecError(BadInput):
    """A job spec with problems. The error lists all of them, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.problems,))
