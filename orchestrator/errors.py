"""One error tree. Every error says what is wrong, what is allowed and what to do next.

``exit_code`` is what the command line returns: 1 the job failed, 2 bad input, 3 something needed is unreachable,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TRACEBACK = "ORCHESTRATOR_TRACEBACK"  # set, it prints the traceback of an error that nobody foresaw


class OrchestratorError(Exception):
    """Base of all errors that a user is meant to read: a message, and the next step as ``hint``."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        # Both values go to args, so that the error survives a trip through pickle between workers.
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.hint}" if self.hint else self.message


class BadInput(OrchestratorError):
    """The user's input can't be used: refused before anything is spent."""

    exit_code = 2


class Unreachable(OrchestratorError):
    """Something needed (a hub, a registry, a cluster, a server) does not answer."""

    exit_code = 3


class JobFailed(OrchestratorError):
    """The job was accepted and then failed."""

    exit_code = 1


class NothingFound(JobFailed):
    """The search has run to its end, and no trial has a result: running on would change nothing."""


class SearchLost(JobFailed):
    """Processes that hold a search together died. What it has found is kept, and it can go on."""


class Interrupted(OrchestratorError):
    """The user ended the job early; the hint names the verb that goes on."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job spec."""

    file: str
    line: int | None  # 1-based; None when the value came from --set or is missing altogether
    where: str  # dotted key, e.g. "search.space.learning_rate"
    message: str  # what is wrong, with the value and what is allowed
    hint: str = ""  # the nearest known key, or the next step

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        text = (
            f"{place}: {self.where}: {self.message}" if self.where else f"{place}: {self.message}"
        )
        return f"{text} ({self.hint})" if self.hint else text


class SpecError(BadInput):
    """A job spec with problems: all of them, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.problems,))
