"""A search's journal on disk: a line for each batch of events, and checkpoints in files.

A line is written whole or not at all, and the lines decide what has happened. Checkpoints are
written before the line that reports them, and their predecessors are removed after it. So the
reports in the journal have their checkpoints, whatever moment a process dies at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import BadInput
from orchestrator.search.state.events import Event, Reported, from_document, to_document
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.history import History
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.utils.atomic import write_whole


class Journal:
    """A writer of one search's events, for one process at a time.

    It raises OSError when the disk does not accept them. Checkpoints at multiples of ``kept_every``
    steps are kept, so that a population can copy them.
    """

    def __init__(
        self, folder: SearchFolder, history: History, kept_every: int | None = None
    ) -> None:
        self._folder = folder
        self._end = history.length
        self._newest = history.steps()
        self._kept_every = kept_every

    def append(self, events: Sequence[Event], spent_s: float) -> None:
        """Add a batch of events, completely or, when this raises, not at all."""
        reports = [event.report for event in events if isinstance(event, Reported)]
        newest = {report.trial: report.step for report in reports}
        for report in reports:
            if newest[report.trial] == report.step or self._stays(report.step):
                write_whole(self._folder.checkpoint(report.trial, report.step), report.checkpoint)
        line = json.dumps(
            {"spent_s": round(spent_s, 3), "events": [to_document(event) for event in events]}
        )
        self._write(line.encode() + b"\n")
        for trial, step in newest.items():
            former = self._newest.get(trial, step)
            if former != step and not self._stays(former):
                self._folder.checkpoint(trial, former).unlink(missing_ok=True)
            self._newest[trial] = step

    def _stays(self, step: int) -> bool:
        return self._kept_every is not None and step % self._kept_every == 0

    def _write(self, line: bytes) -> None:
        with self._folder.journal.open("r+b" if self._end else "wb") as stream:
            stream.seek(self._end)
            stream.truncate()  # removes a partial line of an earlier attempt
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._end += len(line)


def read_history(folder: SearchFolder) -> History:
    """Read the journal and the newest checkpoints.

    A line that was cut short is ignored. A trial without a sound checkpoint begins again. Raises
    BadInput for a journal that holds anything else than what ``Journal`` writes.
    """
    history = _read_lines(folder.journal)
    broken = {}
    for trial, step in history.steps().items():
        try:
            history.checkpoints[trial] = _read_checkpoint(folder, trial, step)
        except (OSError, BadInput) as error:
            broken[trial] = str(error)

    def checkpoint_at(trial: str, step: int) -> bytes:
        try:
            return _read_checkpoint(folder, trial, step)
        except (OSError, BadInput):
            return b""  # the checkpoint was kept for copying only, so the trial is not copied

    return replace(history.without(broken), checkpoint_at=checkpoint_at)


def _read_checkpoint(folder: SearchFolder, trial: str, step: int) -> bytes:
    data = folder.checkpoint(trial, step).read_bytes()
    Checkpoint.from_bytes(data)
    return data


def read_events(folder: SearchFolder) -> History:
    """Read the journal without the checkpoints: enough to show a search, not to resume it."""
    return _read_lines(folder.journal)


def _read_lines(file: Path) -> History:
    data = file.read_bytes() if file.exists() else b""
    length = data.rfind(b"\n") + 1
    events: list[Event] = []
    spent_s = 0.0
    for number, line in enumerate(data[:length].splitlines(), start=1):
        try:
            document = json.loads(line)
            events += [from_document(event) for event in document["events"]]
            spent_s = float(document["spent_s"])
        except (ValueError, KeyError, TypeError, BadInput) as error:
            raise BadInput(
                f"{file}:{number} can't be read: {type(error).__name__}: {error}",
                f"the search goes on from what came before if you remove line {number} and all "
                "after it",
            ) from None
    return History(events, spent_s, length)
