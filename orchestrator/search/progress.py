"""What a search tells its user while it runs, and the clock that times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.events import Listener
from orchestrator.search.state.history import History
from orchestrator.tuning.meter import Reading


class Progress(Listener, Protocol):
    """The progress display of the command line.

    ``stage`` names the step that the job is at outside its trials. ``note`` shows a remark.
    ``trials`` returns a context that shows the trials while they run. ``within`` shows how far each
    worker is within its round or evaluation; it is called from a thread.
    """

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def within(self, readings: Mapping[str, Reading]) -> None: ...

    def trials(
        self, trials: Sequence[tuple[str, TrialSpec]], total: int, history: History
    ) -> AbstractContextManager[None]: ...


ProgressFactory = Callable[[JobSpec], Progress]


@dataclass
class Clock:
    """The time that a job spends on each of its steps."""

    started: float = field(default_factory=time.monotonic)
    marks: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def after(cls, seconds: float) -> Clock:
        """Make a clock that was started ``seconds`` ago."""
        started = time.monotonic() - seconds
        return cls(started=started, last=started)

    def mark(self, name: str, until: float | None = None) -> None:
        """Book the time since the last mark, up to ``until`` or to now, under ``name``."""
        moment = time.monotonic() if until is None else until
        self.marks[name] = round(self.marks.get(name, 0.0) + moment - self.last, 3)
        self.last = moment

    def mark_preparation(self, making_s: float) -> None:
        """Book the preparation, of which ``making_s`` seconds made a built-in model."""
        self.mark("model", until=self.last + making_s)
        self.mark("prepare")

    def before(self) -> float:
        """Return the seconds until Ray was up.

        The time to make a built-in model is left out, since a model is made only once.
        """
        return self.marks.get("prepare", 0.0) + self.marks.get("ray", 0.0)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each mark, with the totals that ``run --json`` prints."""
        startup = sum(self.marks.get(name, 0.0) for name in ("model", "prepare", "ray", "workers"))
        return {
            "total": round(time.monotonic() - self.started, 3),
            "startup": round(startup, 3),
            "training": self.marks.get("trials", 0.0),
            **self.marks,
        }
