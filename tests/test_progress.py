"""The progress that a person sees while a search runs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_jobs import small_job

from orchestrator.cli import progress as progress_module
from orchestrator.cli.progress import (
    ConsoleProgress,
    duration,
    reading_line,
    reading_lines,
    sparkline,
)
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.trials import TrialStatus
from orchestrator.tuning.meter import Reading, Span
from orchestrator.tuning.reports import Copied, Ending, Report

SPECS = [
    ("t000", TrialSpec("random", None, 5, 0.1, 0)),
    ("t001", TrialSpec("text", "[red]50% off[/red] [/]", 5, 0.3, 1)),
    ("t002", TrialSpec("sample_vocab", None, 20, 0.3, 1)),
]


def report(trial: str, step: int, loss: float | None = 1.5, ending: Ending | None = None) -> Report:
    metrics = {} if loss is None else {"accuracy": 0.5, "loss": loss}
    return Report(trial, step, metrics, 2.25, step, metrics, loss or 1e30, b"", ending)


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return small_job(tmp_path)


class Clock:
    """A clock that a test advances."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(progress_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def shown(job: JobSpec, quiet: bool = False, **console: Any) -> tuple[ConsoleProgress, io.StringIO]:
    out = io.StringIO()
    return ConsoleProgress(job, Console(file=out, width=120, **console), quiet), out


def a_search(progress: ConsoleProgress, clock: Clock | None = None) -> None:
    """Three trials: one finishes, one is stopped, one diverges."""
    progress.stage("starting Ray")
    with progress.trials(SPECS, len(SPECS)):
        for trial, spec in SPECS:
            progress.trial_started(trial, spec)
        for step, trial in ((4, "t000"), (4, "t001"), (8, "t000")):
            if clock:
                clock.now += 10
            progress.trial_reported(trial, report(trial, step, 2.0 - step / 8))
        progress.note("without a prompt: validation loss 7.000")
        progress.trial_ended("t001", TrialStatus.STOPPED, "by the scheduler")
        progress.trial_reported("t002", report("t002", 4, None, "diverged"))
        progress.trial_ended("t002", TrialStatus.FAILED, "diverged at step 4")
        progress.trial_reported("t000", report("t000", 16, 0.25, "steps"))
        progress.trial_ended("t000", TrialStatus.FINISHED, "steps")


def test_plain_lines_without_a_terminal(job: JobSpec, clock: Clock) -> None:
    """There is a line per report, a line per stop, and a summary.

    A report's line has step, metric, training loss and configuration.
    """
    progress, out = shown(job)
    a_search(progress, clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting Ray ..."
    assert lines[1] == "t000 step 4/16 loss 1.500 loss 2.250 [random, 5 tokens, lr 0.1, seed 0]"
    assert lines[2].startswith(
        't001 step 4/16 loss 1.500 loss 2.250 ["[red]50% off[/red] [/]", 5 tokens, lr 0.3, seed 1]'
    )
    assert "without a prompt: validation loss 7.000" in lines
    assert "t001 stopped by the scheduler" in lines and "t002 failed diverged at step 4" in lines
    assert any(line.startswith("t002 step 4/16 diverged") for line in lines)
    assert lines[-1] == "3 trials in 30 s: 1 finished, 1 stopped, 1 failed"
    assert "\x1b" not in out.getvalue()


def test_plain_lines_end_with_their_last_word(job: JobSpec) -> None:
    """An unknown time left and a stop without a reason leave no trailing space."""
    progress, out = shown(job)
    with progress.trials(SPECS, len(SPECS)):
        progress.trial_reported("t000", report("t000", 4))
        progress.trial_ended("t000", TrialStatus.STOPPED, "")
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("seed 0]") and lines[1] == "t000 stopped"
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_copy_is_told_before_its_first_result(job: JobSpec) -> None:
    """The line names the trial whose prompt was copied; later lines have the new configuration."""
    progress, out = shown(job)
    copied = Copied("t002", 4, TrialSpec("sample_vocab", None, 20, 0.36, 0))
    with progress.trials(SPECS, len(SPECS)):
        progress.trial_reported("t000", report("t000", 4))
        progress.trial_reported("t000", replace(report("t000", 8), copied=copied))
    lines = out.getvalue().splitlines()
    assert (
        lines[0].startswith("t000 step 4/16") and "[random, 5 tokens, lr 0.1, seed 0]" in lines[0]
    )
    assert lines[1] == "t000 went on from t002 at step 4"
    assert (
        lines[2].startswith("t000 step 8/16")
        and "[sample_vocab, 20 tokens, lr 0.36, seed 0]" in lines[2]
    )


def test_trials_that_are_not_proposed_yet_count(job: JobSpec, clock: Clock) -> None:
    """The share done counts trials that the searcher has not proposed yet."""
    progress, _ = shown(job)
    with progress.trials([], 4):
        for trial, spec in SPECS[:2]:
            progress.trial_started(trial, spec)
        for step in (4, 8, 12, 16):
            for trial, _ in SPECS[:2]:
                progress.trial_reported(trial, report(trial, step))
        assert progress._done() == 0.5
        assert list(progress._outcome.records) == ["t000", "t001"]


def test_a_live_table_on_a_terminal(job: JobSpec) -> None:
    """The table ranks trials, best first, with their curves; texts are not read as markup."""
    progress, out = shown(job, force_terminal=True, legacy_windows=False)
    a_search(progress)
    drawn = out.getvalue()
    assert "\x1b[" in drawn
    last = drawn[drawn.rindex("configuration") :]
    for text in (
        "t000",
        "random, 5 tokens",
        "[red]50% off",
        "diverged at step 4",
        "3 trials",
        "0.250",
    ):
        assert text in last, last
    assert last.index("t000") < last.index("t001") < last.index("t002")
    assert "starting Ray ..." in drawn and "validation loss 7.000" in drawn


def test_a_live_table_ends_with_an_error(job: JobSpec) -> None:
    """After a failed search, output is plain lines again."""
    progress, out = shown(job, force_terminal=True, legacy_windows=False)
    with pytest.raises(KeyError), progress.trials(SPECS, len(SPECS)):
        raise KeyError
    progress.note("it failed")
    progress.trial_started(*SPECS[0])
    progress.trial_reported("t000", report("t000", 4))
    assert "it failed" in out.getvalue() and "t000 step 4/16" in out.getvalue()


def test_quiet_says_nothing(job: JobSpec) -> None:
    """--quiet leaves standard error empty, on a terminal too."""
    for console in ({}, {"force_terminal": True}):
        progress, out = shown(job, quiet=True, **console)
        a_search(progress)
        assert out.getvalue() == ""


def test_the_time_left_comes_from_the_pace_since_the_first_report(
    job: JobSpec, clock: Clock
) -> None:
    """The worker's start does not count; ended trials predict how long the others will run."""
    progress, _ = shown(job)
    clock.now += 1000  # the base model is loading
    with progress.trials(SPECS, len(SPECS)):
        progress.trial_started(*SPECS[0])
        clock.now += 500
        progress.trial_reported("t000", report("t000", 4))
        assert progress._eta() == ""
        clock.now += 10
        progress.trial_reported("t000", report("t000", 8))
        assert progress._eta() == "about 1 min 40 s left"  # 40 steps of 48 to come, 4 in 10 s
        progress.trial_ended("t000", TrialStatus.STOPPED, "by the scheduler")
        # The two others are expected to stop after 8 steps as well.
        assert progress._eta() == "about 40 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.4, "4 s"),
        (59.6, "1 min 0 s"),
        (123, "2 min 3 s"),
        (3599, "59 min 59 s"),
        (3900, "1 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Durations are rounded once, so that 60 s never appears."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([0.5], "▁"),
        ([0.5, 0.5], "▁▁"),
        ([0, 1], "▁█"),
        ([1, 0.5, 0], "█▅▁"),
        (range(20), "▁▂▂▃▃▄▅▅▆▆▇█"),
    ],
)
def test_sparklines(values: Any, bars: str) -> None:
    """The last twelve values are drawn on their own scale."""
    drawn = sparkline(values)
    assert len(drawn) == min(12, len(values))
    assert drawn[:1] + drawn[-1:] == bars[:1] + bars[-1:]
    assert len(set(drawn)) == len(set(bars))


TRAINING = Reading("training", 2, 4, 4.0, 4.0, {"t000": Span(4, 8), "t001": Span(4, 8)})
ROWS = Reading("evaluating", 120, 400, 4.0, 4.0, subject="no prompt on validation")


@pytest.mark.parametrize(
    ("reading", "line"),
    [
        (TRAINING, "w0 training 2 trials: step 2/4, 0.5 steps/s"),
        (ROWS, "w0 evaluating no prompt on validation: row 120/400, 30 rows/s"),
        (
            replace(ROWS, phase="generating", trials={"t000": Span(0, 4)}),
            "w0 generating 1 trial: row 120/400, 30 rows/s",
        ),
    ],
)
def test_a_line_about_a_running_round(reading: Reading, line: str) -> None:
    """It has the worker, what it does, how far it is and how fast."""
    assert reading_line("w0", reading) == line


def test_many_workers_take_few_lines() -> None:
    """The lines beyond the first few are counted."""
    lines = reading_lines({f"w{number}": ROWS for number in range(6)})
    assert len(lines) == 5 and lines[-1] == "and 2 workers more"


def test_the_table_shows_steps_within_a_round(job: JobSpec, clock: Clock) -> None:
    """Trials show the steps that they have reached, and the time left counts those."""
    progress, out = shown(job, force_terminal=True, legacy_windows=False)
    with progress.trials(SPECS, 2):
        for trial, spec in SPECS[:2]:
            progress.trial_started(trial, spec)
        progress.within({"w0": TRAINING})
        assert progress._eta() == "about 36 s left"  # 36 trial steps of 48, 1 a second
        assert progress._live is not None
        progress._live.refresh()
    drawn = out.getvalue()
    assert "6/16" in drawn and "w0 training 2 trials: step 2/4, 0.5 steps/s" in drawn
    assert "w0 training" not in drawn[drawn.rindex("configuration") :]


def test_a_long_round_gets_a_line_now_and_then(job: JobSpec, clock: Clock) -> None:
    """Without a terminal, a line comes after 30 s without any, and never about short rounds."""
    progress, out = shown(job)
    with progress.trials(SPECS, len(SPECS)):
        clock.now += 1000  # the base model is loading
        progress.within({"w0": TRAINING})
        assert out.getvalue() == ""
        for lasted in range(2, 92, 2):
            clock.now += 2
            progress.within({"w0": replace(TRAINING, lasted=float(lasted))})
    lines = out.getvalue().splitlines()[:-1]
    assert lines == ["w0 training 2 trials: step 2/4, 0.5 steps/s about 36 s left"] * 3
