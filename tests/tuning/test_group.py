"""A group of workers ends with the results of one worker that has the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from group_processes import (
    SGD,
    TRIALS,
    Case,
    Ended,
    Processes,
    ended,
    held,
    left_alone,
    most_whole,
    notes_of,
    roomless,
    short_of_room,
)

from orchestrator.job.spec import TrainSpec
from orchestrator.models.backbone.sharding import bytes_elsewhere
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.prompts import Method

PROMPT, INSIDE = Method("prompt_tuning"), Method("prompt_tuning", inside=True)
PREFIX, NETWORK = Method("prefix_tuning"), Method("p_tuning", "lstm")
GENTLE = SGD.model_copy(update={"clip_norm": 1.0})  # the tiny T5's gradients are in the hundreds
CASES = [
    *(Case("llama", method) for method in (PROMPT, INSIDE, PREFIX, NETWORK)),
    *(Case("gemma3_text", method) for method in (PROMPT, PREFIX)),
    *(Case("t5", method, GENTLE) for method in (PROMPT, INSIDE, PREFIX)),
    *(Case("bert", method) for method in (PREFIX, NETWORK)),
]
OPTIONS = {
    "sum": {"loss_reduction": "sum", "clip_norm": 1.0},
    "sum_per_row": {"loss_reduction": "sum_per_row"},
    "forwards of a row": {"micro_batch_size": 1, "clip_norm": 0.1},
    "fewer rows than workers": {"batch_size": 2},
    "adamw": {"optimizer": "adamw", "momentum": None},
}
sharded_or_not = pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    processes.close()


@lru_cache
def alone(case: Case) -> Ended:
    return ended(replace(case, sharded=False))


def assert_same(parts: list[Ended], wanted: Ended, rel: float = 1e-4) -> None:
    """Compare each worker's reports, and the leader's checkpoints, with those of one worker."""
    for part in parts:
        assert part.frozen
        assert part.bare == pytest.approx(wanted.bare, rel=rel)
        for name, reports in wanted.reports.items():
            got = part.reports[name]
            assert [(r.step, r.ending, r.best_step) for r in got] == [
                (r.step, r.ending, r.best_step) for r in reports
            ]
            for one, other in zip(got, reports, strict=True):
                assert one.metrics == pytest.approx(other.metrics, rel=rel)
                assert one.train_loss == pytest.approx(other.train_loss, rel=rel)
    for name, reports in wanted.reports.items():
        got, expected = (
            Checkpoint.from_bytes(r[-1].checkpoint).tensors
            for r in (parts[0].reports[name], reports)
        )
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                got[key], tensor, rtol=rel, atol=rel * float(tensor.abs().max())
            )
        assert not any(report.checkpoint for part in parts[1:] for report in part.reports[name])


@sharded_or_not
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.family}, {case.method.name}, {case.method.inside}"
)
def test_two_workers_end_where_one_does(two: Processes, case: Case, sharded: bool) -> None:
    """Losses, metrics and prompts agree for every method and family.

    The frozen weights stay unchanged.
    """
    assert_same(two(ended, replace(case, sharded=sharded)), alone(case))


@pytest.mark.long
@pytest.mark.parametrize("option", OPTIONS)
def test_three_workers_end_where_one_does(three: Processes, option: str) -> None:
    """Three workers' sums equal the whole batch's, for each loss reduction.

    This also holds for forwards of one row and for batches smaller than the group.
    """
    case = Case(train=TrainSpec.model_validate({**SGD.model_dump(), **OPTIONS[option]}))
    for sharded in (False, True):
        # AdamW's first updates are signs, so that rounding can change where they lead.
        assert_same(
            three(ended, replace(case, sharded=sharded)),
            alone(case),
            rel=1e-2 if option == "adamw" else 1e-4,
        )


@sharded_or_not
@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_texts_are_the_same(three: Processes, family: str, beams: int, sharded: bool) -> None:
    """Generated texts are the same when rows are divided among workers.

    One worker's texts may end sooner than another's.
    """
    case = Case(
        family, train=GENTLE.model_copy(update={"steps": 2}), generates=True, num_beams=beams
    )
    wanted = alone(case)
    assert_same(three(ended, replace(case, sharded=sharded)), wanted)
    assert "bleu" in wanted.bare


@sharded_or_not
@pytest.mark.parametrize("generates", [False, True], ids=["ranks", "generates"])
def test_one_workers_lack_of_room_is_everyones(
    two: Processes, generates: bool, sharded: bool
) -> None:
    """When memory runs out on one worker, all workers take smaller forwards and none waits.

    This happens in forwards and in backwards; the results stay the same.
    """
    case = Case("llama", generates=generates)
    parts = two(ended, replace(case, sharded=sharded), short_of_room)
    assert_same(parts, alone(case))
    for part in parts:
        for reports in part.reports.values():
            assert (
                "training ran out of memory and went on with forwards of at most"
                in reports[-1].note
            )
            assert "evaluation ran out of memory" in reports[-1].note


@sharded_or_not
def test_trials_without_room_are_reported(two: Processes, sharded: bool) -> None:
    """When one worker has no memory for a row, each trial fails on all workers without a hang."""
    for notes in two(notes_of, Case(sharded=sharded), roomless):
        assert set(notes) == set(TRIALS)
        assert all(
            ending == "no_room" and "memory does not suffice for one row" in note
            for ending, note in notes.values()
        )


@pytest.mark.long
def test_a_worker_keeps_its_part(three: Processes) -> None:
    """Each worker holds about a third of the blocks; together the parts are the loaded weights."""
    whole = Case().backbone()
    parts = three(held, Case(sharded=True))
    blocks = (
        bytes_elsewhere(whole.model, 1_000_000) * 2
    )  # two equal blocks, one of which counts as held
    total = sum(tensor.nbytes for tensor in whole.model.parameters())
    for part in parts:
        assert part.same
        assert part.nbytes == pytest.approx(total - blocks * 2 / 3, rel=0.05)


def test_one_block_is_whole_at_a_time(two: Processes) -> None:
    """At most one block is whole at a time.

    This is so in forwards and in backwards, for prompts that run once and for rows.
    """
    assert two(most_whole, Case()) == [0, 0]


def test_an_error_is_no_lack_of_room(two: Processes) -> None:
    """Other errors of one worker reach its caller, where Ray Train ends the group."""
    assert two(left_alone, Case()) == ["RuntimeError: shapes do not match", "left alone"]
