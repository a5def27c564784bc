"""Running out of memory: work is repeated in smaller pieces, with unchanged results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import random_prompts, small_task, tiny_backbone

from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone, PreparedPrompts
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.out_of_memory import NoRoom, Room, needs_room, ran_out
from orchestrator.tuning.reports import EvaluationJob, Report

TRIALS = {
    "short": TrialSpec("random", None, 3, 0.02, 0),
    "long": TrialSpec("sample_vocab", None, 7, 0.3, 1),
    "one": TrialSpec("class_labels", None, 1, 0.1, 2),
}
TRAIN = TrainSpec(steps=4, batch_size=5, evaluate_every=2)
ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    lambda: RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
    MemoryError,
]


def generation_task() -> Task:
    """Return a task whose evaluations also generate texts."""
    task = small_task(None)
    for split in ("validation", "test"):
        texts = [["the quick fox"]] * len(task.splits[split])
        task.splits[split] = replace(task.splits[split], references=texts)
    return replace(task, decoding=Decoding(5, num_beams=2))


def ended(
    backbone: Backbone, task: Task, names: Sequence[str] = tuple(TRIALS)
) -> dict[str, list[Report]]:
    """Return every report of the trials, which share one engine."""
    engine = Engine(backbone, task, TRAIN, SearchSpec(metric="loss"), capacity=len(names))
    for name in names:
        engine.seat(name, TRIALS[name])
    reports: dict[str, list[Report]] = {name: [] for name in names}
    while engine.slots:
        for report in engine.round():
            reports[report.trial].append(report)
    return reports


def cramped(
    error: Callable[[], Exception] = MemoryError,
    tokens: int = 10_000,
    prompts: int = 100,
    longest: int = 100,
) -> Backbone:
    """Return a backbone that runs out of memory beyond certain sizes.

    The limits are tokens of a forward, the number of prompts, and a prompt's length.
    """
    backbone: Any = tiny_backbone()
    forced, start, prepare = backbone.teacher_forced, backbone.start, backbone.prepare
    along = backbone.start_along

    def fits(inputs: Sequence[Sequence[int]]) -> None:
        if len(inputs) * max(map(len, inputs)) > tokens:
            raise error()

    def teacher_forced(prompt: Any, inputs: Any, *rest: Any) -> Any:
        fits(inputs)
        return forced(prompt, inputs, *rest)

    def started(prompt: Any, inputs: Any, *rest: Any) -> Any:
        fits(inputs)
        return start(prompt, inputs, *rest)

    def started_along(prompts: Any, inputs: Any, *rest: Any) -> Any:
        fits(inputs)
        return along(prompts, inputs, *rest)

    def prepared(asked: Any) -> Any:
        lengths = [
            one.num_virtual_tokens if hasattr(one, "num_virtual_tokens") else len(one)
            for one in asked
        ]
        if len(asked) > prompts or max(lengths) > longest:
            raise error()
        return prepare(asked)

    backbone.teacher_forced, backbone.start, backbone.prepare = teacher_forced, started, prepared
    backbone.start_along = started_along
    return backbone  # type: ignore[no-any-return]


def assert_same(got: dict[str, list[Report]], wanted: dict[str, list[Report]]) -> None:
    for name, reports in wanted.items():
        assert [(r.step, r.ending) for r in got[name]] == [(r.step, r.ending) for r in reports]
        for one, other in zip(got[name], reports, strict=True):
            assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("error", "tokens"),
    list(zip(ERRORS, [150, 60, 41], strict=True)),
    ids=["accelerator", "allocator", "python"],
)
def test_smaller_forwards_change_nothing(error: Callable[[], Exception], tokens: int) -> None:
    """Trials end as without a limit, however small the forwards, down to one row.

    Their reports say what happened.
    """
    wanted = ended(tiny_backbone(), small_task())
    got = ended(cramped(error, tokens=tokens), small_task())
    assert_same(got, wanted)
    assert all(
        "training ran out of memory and went on with forwards of at most" in r[-1].note
        for r in got.values()
    )
    assert all(not report.note for reports in wanted.values() for report in reports)


@pytest.mark.parametrize("prompts", [2, 1])
def test_fewer_trials_at_a_time_change_nothing(prompts: int) -> None:
    """When there are too many prompts, trials step in smaller groups, with equal results."""
    got = ended(cramped(prompts=prompts), small_task())
    assert_same(got, ended(tiny_backbone(), small_task()))
    assert all(f"{prompts} trials at a time" in reports[-1].note for reports in got.values())


def test_both_at_once() -> None:
    """A limit on forwards and a limit on prompts work together."""
    assert_same(
        ended(cramped(tokens=60, prompts=1), small_task()), ended(tiny_backbone(), small_task())
    )


def test_texts_are_generated_in_smaller_batches() -> None:
    """Evaluations that generate texts also use smaller batches."""
    got = ended(cramped(tokens=60, prompts=2), generation_task())
    assert_same(got, ended(tiny_backbone(), generation_task()))
    assert "evaluation ran out of memory" in got["short"][-1].note


def test_gradients_of_a_half_done_step_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that reached the prompts before memory ran out are dropped."""
    wanted = ended(tiny_backbone(), small_task())
    send, calls = PreparedPrompts.backward_from, []

    def fails_at_first(self: PreparedPrompts, leaf: PreparedPrompts, first: int) -> None:
        send(self, leaf, first)
        calls.append(self.count)
        if len(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(PreparedPrompts, "backward_from", fails_at_first)
    assert_same(ended(tiny_backbone(), small_task()), wanted)
    assert calls[:3] == [3, 2, 1]


def test_only_who_does_not_fit_alone_fails() -> None:
    """A trial whose prompt is too long for any step fails, with the reason.

    The others end as usual and do not keep the small pieces that were tried for that trial.
    """
    got = ended(cramped(longest=5), small_task())
    (lost,) = got.pop("long")
    assert (lost.ending, lost.step, lost.metrics) == ("no_room", 0, {})
    assert (
        lost.note.startswith("memory does not suffice for one row of")
        and "7 virtual tokens" in lost.note
    )
    assert_same(got, ended(tiny_backbone(), small_task(), ["short", "one"]))
    assert not any(report.note for reports in got.values() for report in reports)


def test_nothing_fits() -> None:
    """When no row fits, trials fail, and an evaluation's error says what is too large."""
    backbone = cramped(tokens=1)
    ((report,),) = ended(backbone, small_task(), ["one"]).values()
    assert report.ending == "no_room" and report.step == 0
    engine = Engine(backbone, small_task(), TRAIN, SearchSpec(), capacity=1)
    with pytest.raises(
        JobFailed, match=r"the test split can't be evaluated: memory does not suffice"
    ):
        engine.evaluate(EvaluationJob("test"))


def test_baselines_are_cut_too() -> None:
    """The bare model's metrics are the same with small forwards."""
    wanted = Engine(tiny_backbone(), small_task(), TRAIN, SearchSpec(), 1).evaluate(
        EvaluationJob("test")
    )
    got = Engine(cramped(tokens=41), small_task(), TRAIN, SearchSpec(), 1).evaluate(
        EvaluationJob("test")
    )
    assert got == pytest.approx(wanted, rel=1e-6)


def test_other_errors_pass() -> None:
    """Errors other than lack of memory reach the caller unchanged."""
    with pytest.raises(RuntimeError, match="shapes do not match"):
        ended(cramped(lambda: RuntimeError("shapes do not match"), tokens=60), small_task())
    assert not ran_out(ValueError("out of memory")) and not ran_out(KeyError("x"))
    assert ran_out(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )


def test_what_was_learned_is_kept() -> None:
    """The next work starts with the sizes that fitted last time."""
    room, tried = Room(), []

    def work(places: Sequence[int]) -> list[int]:
        tried.append((len(places), room.tokens))
        with needs_room(64, divisible=True):
            if room.tokens is None:
                raise MemoryError
        if len(places) > 2:
            raise NoRoom
        return list(places)

    assert room.each(4, work) == [0, 1, 2, 3] == room.each(4, work)
    assert tried == [(4, None), (4, 32), (2, 32), (2, 32), (2, 32), (2, 32)]
    assert (
        room.note
        == "ran out of memory and went on with forwards of at most 32 tokens and 2 trials at a time"
    )


def test_the_failed_piece_leaves_memory() -> None:
    """The failed attempt's tensors are released before the work is repeated."""
    import weakref

    kept: list[weakref.ref[Any]] = []

    def work(places: Sequence[int]) -> list[int]:
        if kept:
            return [int(kept[0]() is not None)]
        tensor = random_prompts(tiny_backbone(), [4])[0] * 2
        kept.append(weakref.ref(tensor))
        with needs_room(10, divisible=True):
            raise MemoryError

    assert Room().each(1, work) == [0]
