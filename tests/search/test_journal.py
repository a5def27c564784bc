"""A search's state on disk: complete when read back, whenever its writer dies."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.search.state.events import (
    Ended,
    Event,
    Found,
    Reported,
    Started,
    from_document,
    to_document,
)
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.history import History
from orchestrator.search.state.journal import Journal, read_history
from orchestrator.search.state.recorder import Recorder
from orchestrator.search.state.trials import TrialStatus
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.reports import Report

SPEC = TrialSpec("random", None, 2, 0.1, 0)


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    return SearchFolder(tmp_path)


def checkpoint(step: int) -> bytes:
    tensors = {"prompt.prompt": torch.full((2, 4), float(step))}
    return Checkpoint(step, step, {"loss": 1.0}, 0, "model", tensors).to_bytes()


def report(trial: str, step: int, pending: int = 0) -> Report:
    metrics = {"loss": 1 / 3 + step}
    return Report(
        trial, step, metrics, math.inf, step, metrics, 1 / 3, checkpoint(step), pending=pending
    )


def files(folder: SearchFolder) -> list[str]:
    return sorted(file.name for file in folder.checkpoints.iterdir())


def test_what_is_written_comes_back(folder: SearchFolder) -> None:
    """Events are read back exactly and in order, with the seconds and each trial's newest
    checkpoint."""
    journal = Journal(folder, History())
    first: list[Event] = [
        Started("t0", SPEC),
        Found("baselines", {"zero_shot": {"loss": 0.1}}),
        Reported(report("t0", 4)),
    ]
    placed = replace(report("t0", 8), worker="w1", place={"node": "n", "device": "cpu"})
    second: list[Event] = [
        Reported(placed),
        Reported(report("t1", 4)),
        Ended("t0", TrialStatus.STOPPED, "why"),
    ]
    journal.append(first, 1.5)
    assert files(folder) == ["t0-4.safetensors"]
    journal.append(second, 2.5)
    assert files(folder) == ["t0-8.safetensors", "t1-4.safetensors"]
    history = read_history(folder)
    bare = [
        replace(it, report=replace(it.report, checkpoint=b"")) if isinstance(it, Reported) else it
        for it in second
    ]
    assert history.events[3:] == bare and len(history.events) == 6
    assert history.reports[1].place == placed.place  # reports are compared without it
    assert history.spent_s == 2.5 and history.checkpoints == {
        "t0": checkpoint(8),
        "t1": checkpoint(4),
    }
    assert history.remaining(["t0", "t1", "t2"]) == ["t1", "t2"]
    assert history.found("baselines") == first[1] and history.found("other") is None


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_cut_short_never_happened(folder: SearchFolder, cut: int) -> None:
    """A truncated last line is ignored, though its checkpoint exists; writing goes on after it."""
    journal = Journal(folder, History())
    journal.append([Reported(report("t0", 4))], 1.0)
    kept = folder.checkpoint("t0", 4).read_bytes()
    journal.append([Reported(report("t0", 8))], 2.0)
    folder.checkpoint("t0", 4).write_bytes(
        kept
    )  # the old checkpoint is removed only after the line is written
    folder.journal.write_bytes(folder.journal.read_bytes()[:-cut])
    history = read_history(folder)
    assert (
        history.steps() == {"t0": 4}
        and history.checkpoints == {"t0": kept}
        and history.spent_s == 1.0
    )
    Journal(folder, history).append([Reported(report("t0", 8))], 3.0)
    assert [it.step for it in read_history(folder).reports] == [4, 8]
    assert files(folder) == ["t0-8.safetensors"]


def test_a_trial_without_a_sound_checkpoint_begins_again(folder: SearchFolder) -> None:
    """A trial whose checkpoint is truncated or missing begins again, even if it had ended.

    The other trials are unchanged.
    """
    journal = Journal(folder, History())
    journal.append(
        [
            Started("t0", SPEC),
            Reported(report("t0", 4)),
            Ended("t0", TrialStatus.FINISHED, "steps"),
        ],
        1.0,
    )
    journal.append([Started("t1", SPEC), Reported(report("t1", 4)), Reported(report("t2", 4))], 1.0)
    folder.checkpoint("t0", 4).write_bytes(checkpoint(4)[:40])
    folder.checkpoint("t2", 4).unlink()
    history = read_history(folder)
    assert history.lost.keys() == {"t0", "t2"} and history.ended == {}
    assert history.steps() == {"t1": 4}


def test_a_line_that_is_none_is_refused(folder: SearchFolder) -> None:
    """A line that no interrupted write explains raises BadInput with its number and a remedy."""
    Journal(folder, History()).append([Started("t0", SPEC)], 1.0)
    folder.journal.write_bytes(b'{"events": [{"kind": "other"}]}\n' + folder.journal.read_bytes())
    with pytest.raises(BadInput, match=r"journal.jsonl:1 can't be read: KeyError") as refused:
        read_history(folder)
    assert "remove line 1" in refused.value.hint


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"kind": "ended", "trial": "t0", "status": "odd", "note": ""}, "'odd' is not a valid"),
        (
            {"kind": "started", "trial": "t0", "config": {"seed": 0}},
            "configuration has no learning_rate",
        ),
    ],
)
def test_a_line_with_a_value_that_is_none_is_refused(
    folder: SearchFolder, event: dict[str, Any], reason: str
) -> None:
    """An unknown status and a configuration with a missing key are refused with their line."""
    folder.journal.write_text(json.dumps({"spent_s": 1.0, "events": [{**event, "at": 1}]}) + "\n")
    with pytest.raises(BadInput, match=rf"journal.jsonl:1 can't be read: .*{reason}"):
        read_history(folder)


def test_events_are_written_as_earlier_releases_wrote_them() -> None:
    """A start and an end are read from, and written as, the documents of earlier releases."""
    config = {"init": {"text": "Is it?"}, "num_virtual_tokens": 2, "learning_rate": 0.1, "seed": 3}
    spec = TrialSpec("text", "Is it?", 2, 0.1, 3)
    known: list[tuple[Event, dict[str, Any]]] = [
        (
            Started("t0", spec, at=5),
            {"kind": "started", "trial": "t0", "config": config, "at": 5},
        ),
        (
            Ended("t0", TrialStatus.STOPPED, "why", at=7),
            {"kind": "ended", "trial": "t0", "status": "stopped", "note": "why", "at": 7},
        ),
    ]
    for event, document in known:
        assert json.dumps(to_document(event)) == json.dumps(document)
        assert from_document(document) == event


class Heard:
    """Collects the events that a recorder passes on and the problems that it reports."""

    def __init__(self, folder: SearchFolder, history: History | None = None) -> None:
        self.events: list[Event] = []
        self.problems: list[str] = []
        self.folder = folder
        self.behind = False
        known = history or History()
        self.recorder = Recorder(Journal(folder, known), known, self.hear, self.problems.append)

    def hear(self, events: Sequence[Event]) -> None:
        self.events += events
        if not self.problems:
            self.behind = self.behind or len(read_history(self.folder).events) < len(self.events)


def test_a_round_is_kept_whole_or_not_at_all(folder: SearchFolder) -> None:
    """Reports are written once their round is complete; an incomplete round is dropped."""
    heard = Heard(folder)
    with heard.recorder as recorder:
        recorder.trial_started("t0", SPEC)
        for trial, step, pending in (("t0", 4, 1), ("t1", 4, 0), ("t0", 8, 1)):
            recorder.trial_reported(trial, report(trial, step, pending))
        recorder.found("base_model", "abc")
    history = read_history(folder)
    assert [(it.trial, it.step) for it in history.reports] == [("t0", 4), ("t1", 4)]
    assert history.found("base_model") is not None
    assert not heard.behind  # events are in the journal before listeners get them
    assert len(heard.events) == len(history.events) == 4


def test_flush_writes_all_there_is(folder: SearchFolder) -> None:
    """flush writes the incomplete round that the end of a study leaves."""
    with Heard(folder).recorder as recorder:
        recorder.trial_reported("t0", report("t0", 4, pending=3))
        recorder.trial_ended("t0", TrialStatus.STOPPED, "search.stop.metric was reached")
        recorder.flush()
        assert read_history(folder).ended.keys() == {"t0"}


def test_a_full_disk_does_not_end_the_search(folder: SearchFolder) -> None:
    """A failed write is reported once and retried; listeners still get every event."""
    heard = Heard(folder)
    folder.checkpoints.write_text("in the way of the folder")
    with heard.recorder as recorder:
        for step in (4, 8):
            recorder.trial_reported("t0", report("t0", step))
            recorder.flush()
        assert len(heard.problems) == 1 and "can't be written" in heard.problems[0]
        assert len(heard.events) == 2 and not folder.journal.exists()
        folder.checkpoints.unlink()
    assert [it.step for it in read_history(folder).reports] == [4, 8]


def test_the_clock_goes_on(folder: SearchFolder) -> None:
    """The seconds of a resumed search are added to those before."""
    with Heard(folder, History(spent_s=100.0)).recorder as recorder:
        recorder.trial_started("t0", SPEC)
    assert 100.0 <= read_history(folder).spent_s < 130.0
