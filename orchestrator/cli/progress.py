"""Progress of a search on standard error: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.job.space import TrialSpec, confirming_total
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import Outcome, TrialRecord, TrialStatus
from orchestrator.tuning.meter import Reading
from orchestrator.tuning.reports import BROKEN, Report
from orchestrator.utils.wording import counted

ROWS = 20  # at most, in the live table; the best trials come first
WORKER_LINES = 4  # at most, below the live table or at a time elsewhere
SILENCE_S = 30.0  # without a terminal, time without any line before one about running rounds
NOTHING = History()
SPARKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """A place on a screen that shows the newest table."""

    def update(self, renderable: Group, /) -> None: ...


class ConsoleProgress:
    """Progress display that shows stages, notes and trials as they happen."""

    def __init__(self, job: JobSpec, console: Console, quiet: bool = False) -> None:
        self._job = job
        self._console = console
        self._quiet = quiet
        self._live: View | None = None
        self._outcome = Outcome()
        self._readings: dict[str, Reading] = {}
        self._said = time.monotonic()
        self._lock = threading.RLock()  # readings come from a thread of their own
        self._total = 0
        self._started = 0.0
        self._first: tuple[float, float] | None = (
            None  # latest first report of a trial: time, steps done by then
        )

    def stage(self, text: str) -> None:
        self._say(f"{text} ...")

    def note(self, text: str) -> None:
        self._say(text)

    @contextmanager
    def trials(
        self, trials: Sequence[tuple[str, TrialSpec]], total: int, history: History = NOTHING
    ) -> Iterator[None]:
        """Show the trials while the block runs.

        ``trials`` are the trials that are known in advance, ``total`` the number that the search
        will have. ``history`` is what happened before, if the search was resumed.
        """
        self._outcome = Outcome(trials)
        self._total = total
        history.tell(self._outcome)
        self._started = time.monotonic()
        view = None if self._quiet else self._view()
        if view is None:
            yield
            self._say(self._summary())
            return
        try:
            with view as live:
                self._live = live
                yield
                with self._lock:
                    self._readings = {}
                    self._live = None  # the table that stays has no running rounds
                    live.update(self._table())
        finally:
            self._live = None

    def _view(self) -> AbstractContextManager[View] | None:
        """Return a live table, or None if there is no terminal to show it."""
        if not self._console.is_terminal:
            return None
        return Live(self._table(), console=self._console, refresh_per_second=4, transient=False)

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        with self._lock:
            self._outcome.trial_started(trial, spec)
            self._update()

    def within(self, readings: Mapping[str, Reading]) -> None:
        """Show how far each worker is within its round or evaluation.

        Without a table, a long round gets a line now and then, when nothing else was shown.
        """
        with self._lock:
            self._readings = dict(readings)
            self._update()
            if self._live is None and self._silent(readings):
                for line in reading_lines(readings):
                    self._say(f"{line} {self._eta()}".rstrip())

    def _silent(self, readings: Mapping[str, Reading]) -> bool:
        longest = max((reading.lasted for reading in readings.values()), default=0.0)
        return min(longest, time.monotonic() - self._said) >= SILENCE_S

    def trial_reported(self, trial: str, report: Report) -> None:
        with self._lock:
            self._trial_reported(trial, report)

    def _trial_reported(self, trial: str, report: Report) -> None:
        self._outcome.trial_reported(trial, report)
        if self._first is None or report.step <= self._job.train.evaluate_every:
            # A round's reports arrive in a burst, so the pace is measured from the last report of
            # the latest first round.
            self._first = time.monotonic(), self._steps()[0]
        self._update()
        if self._live is None:
            if report.copied is not None:
                self._say(
                    f"{trial} went on from {report.copied.source} at step {report.copied.step}"
                )
            self._say(self._line(trial, report))

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None:
        with self._lock:
            self._outcome.trial_ended(trial, status, note)
            self._update()
        if self._live is None and status != TrialStatus.FINISHED:
            self._say(f"{trial} {status} {note}".rstrip())

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _update(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _line(self, trial: str, report: Report) -> str:
        record, metric = self._outcome.records[trial], self._job.search.metric
        value = (
            f"{metric} {report.metrics[metric]:.3f}"
            if report.metrics
            else BROKEN[report.ending or "diverged"]
        )
        steps = f"step {report.step}/{self._job.train.steps}"
        loss = "" if math.isnan(report.train_loss) else f" loss {report.train_loss:.3f}"
        line = f"{trial} {steps} {value}{loss} [{record.spec.label()}]"
        return f"{line} {self._eta()}".rstrip()

    def _steps(self) -> tuple[float, float]:
        """Count the trial steps done, and estimate those still to come.

        The estimate assumes that trials will stop as early as those that have ended so far.
        """
        records = list(self._outcome.records.values())
        steps = {record.id: self._step(record) for record in records}
        own = [record for record in records if not record.spec.confirms]
        ended = [record.step for record in own if record.status.is_over]
        expected = sum(ended) / len(ended) if ended else float(self._job.train.steps)
        to_come = sum(
            max(0.0, expected - steps[record.id]) for record in records if not record.status.is_over
        )
        to_come += expected * max(0, self._total - len(own))  # not proposed yet
        # Trials that confirm others go to the last step.
        confirming = confirming_total(self._job.search) - (len(records) - len(own))
        to_come += float(self._job.train.steps) * max(0, confirming)
        return float(sum(steps.values())), to_come

    def _step(self, record: TrialRecord) -> int:
        """Return the step that a trial has reached, within its round too."""
        within = [
            reading.step_of(record.id)
            for reading in self._readings.values()
            if record.id in reading.trials and not record.status.is_over
        ]
        return max([record.step, *within])

    def _speed(self) -> float:
        """Return the trial steps that all workers take in a second of training, as last read."""
        return sum(
            reading.rate * len(reading.trials)
            for reading in self._readings.values()
            if reading.phase == "training"
        )

    def _done(self) -> float:
        """Estimate the fraction of the search that is done, from 0 to 1."""
        behind, to_come = self._steps()
        return behind / (behind + to_come) if behind else 0.0

    def _eta(self) -> str:
        """Estimate the time left from the pace since a trial last made its first report.

        Time before that is left out because a worker was still starting. Before there is a pace,
        the workers' steps per second are used. Empty without an estimate.
        """
        behind, to_come = self._steps()
        if not to_come:
            return ""
        if self._first is not None and behind > self._first[1]:
            seconds = (time.monotonic() - self._first[0]) * to_come / (behind - self._first[1])
        elif speed := self._speed():
            seconds = to_come / speed
        else:
            return ""
        return f"about {duration(seconds)} left"

    def _summary(self) -> str:
        statuses = [record.status for record in self._outcome.records.values()]
        counts = ", ".join(
            f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)
        )
        return (
            f"{counted(len(statuses), 'trial')} in "
            f"{duration(time.monotonic() - self._started)}: {counts}"
        )

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = (
            "rank",
            "trial",
            "configuration",
            "step",
            self._job.search.metric,
            "curve",
            "slot",
            "status",
        )
        for name in columns:
            justify = "right" if name in ("rank", "step", self._job.search.metric) else "left"
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for rank, record in enumerate(self._ordered()[:ROWS], start=1):
            table.add_row(*self._row(rank, record))
        bar = ProgressBar(total=1.0, completed=self._done(), width=40)
        workers = [Text(line) for line in reading_lines(self._readings)]
        return Group(table, *workers, bar, Text(f"{self._summary()}  {self._eta()}"))

    def _ordered(self) -> list[TrialRecord]:
        ranked = self._outcome.ranking(self._job.search)
        others = [
            record
            for record in self._outcome.records.values()
            if record not in ranked and record.status != TrialStatus.WAITING
        ]
        # Trials that confirm others run last, and would fall off the end of a long table.
        return sorted([*ranked, *others], key=lambda record: not record.spec.confirms)

    def _row(self, rank: int, record: TrialRecord) -> list[str | Text]:
        metric = self._job.search.metric
        best = record.metrics.get(metric)
        shown = "" if best is None else f"{best:.3f}"
        status = (
            f"{record.status} ({record.note})"
            if record.status == TrialStatus.FAILED and record.note
            else record.status
        )
        # Text, because an init text may contain what rich would read as markup.
        label = Text(record.spec.label())
        return [
            str(rank),
            record.id,
            label,
            f"{self._step(record)}/{self._job.train.steps}",
            shown,
            sparkline([value for _, value in record.curve(metric)]),
            record.slot,
            status,
        ]


def reading_lines(readings: Mapping[str, Reading]) -> list[str]:
    """Write a line for each worker, and one for those beyond the first few."""
    lines = [reading_line(worker, readings[worker]) for worker in sorted(readings)]
    others = len(lines) - WORKER_LINES
    return (
        lines if others <= 0 else [*lines[:WORKER_LINES], f"and {counted(others, 'worker')} more"]
    )


def reading_line(worker: str, reading: Reading) -> str:
    """Say how far a worker is, for example ``w0 training 4 trials: step 37/90, 1.3 steps/s``."""
    subject = counted(len(reading.trials), "trial") if reading.trials else reading.subject
    unit = "step" if reading.phase == "training" else "row"
    line = f"{worker} {reading.phase} {subject}: {unit} {reading.done}/{reading.total}"
    return f"{line}, {reading.rate:.3g} {unit}s/s"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Draw the last ``width`` values as bars, scaled to their own range."""
    shown = list(values[-width:])
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    return "".join(
        SPARKS[round((value - low) / ((high - low) or 1.0) * (len(SPARKS) - 1))] for value in shown
    )


def duration(seconds: float) -> str:
    """Format seconds, for example as 1 h 5 min, 2 min 3 s or 4 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
