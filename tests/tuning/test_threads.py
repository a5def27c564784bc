"""A CPU's cores share a step's rows, with the results of one core, also after errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from models import VERBALIZERS, backbone_of, small_task, text_rows, tiny_backbone, tokenizer_of

from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import MethodName, SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.cpu_threads import MOST, Threads
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.reports import EvaluationJob, Report

PROMPTS = [TrialSpec("random", None, 3, 0.02, 0), TrialSpec("sample_vocab", None, 7, 0.05, 1)]
SPECS: dict[MethodName, list[TrialSpec]] = {
    "prompt_tuning": PROMPTS,
    "prefix_tuning": PROMPTS,
    "p_tuning": PROMPTS,
    "lora": [TrialSpec("", None, 0, 0.03, 0, rank=4, alpha=16)],
    "adapter": [TrialSpec("", None, 0, 0.03, 0, bottleneck=8)],
    "model_tuning": [TrialSpec("", None, 0, 0.003, 0)],
}
TRAIN = TrainSpec(steps=4, batch_size=5, evaluate_every=2)
SEARCH = SearchSpec(metric="loss")


@lru_cache
def task_of(family: str, method: MethodName, backbone: Backbone) -> Task:
    verbalizer = Verbalizer(
        tuple(VERBALIZERS["several tokens"]), tuple(VERBALIZERS["several tokens"].values())
    )
    encoder = Encoder(
        tokenizer_of(family), Template("{text}\nspam?"), verbalizer, 40, 32, backbone.family
    )
    rows = {
        split: encoder.encode(text_rows(11, seed), "label")
        for seed, split in enumerate(("train", "validation"))
    }
    return Task(encoder, rows, method=Method(method))


def run_out(engine: Engine, specs: Sequence[TrialSpec]) -> list[Report]:
    for place, spec in enumerate(specs):
        engine.seat(f"t{place}", spec)
    reports = []
    while engine.slots:
        reports += engine.round()
    return reports


def engine_of(family: str, method: MethodName, cores: int, train: TrainSpec = TRAIN) -> Engine:
    backbone = backbone_of(family, torch.float64)
    return make_engine(
        backbone, task_of(family, method, backbone), train, SEARCH, len(SPECS[method]), cores=cores
    )


@pytest.mark.parametrize("cores", [2, 3, 7])
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "t5", "bert"])
def test_the_rows_of_a_step_may_be_shared(family: str, method: MethodName, cores: int) -> None:
    """Losses and metrics are those of one core, also with fewer rows than cores."""
    train = TRAIN.model_copy(
        update={"optimizer": "sgd", "clip_norm": 1.0}
    )  # Adam would amplify tiny gradients
    wanted, got = (
        run_out(engine_of(family, method, count, train), SPECS[method]) for count in (1, cores)
    )
    assert [(one.trial, one.step) for one in got] == [(one.trial, one.step) for one in wanted]
    near = 1e-6 if SPECS[method] is PROMPTS else 1e-4  # baselines train in float32
    for one, other in zip(got, wanted, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=near)
        assert one.metrics == pytest.approx(other.metrics, rel=10 * near)


def test_a_search_repeats_itself() -> None:
    """Two runs give the same bytes, whichever thread ends first."""
    one, two = (
        run_out(engine_of("llama", method, 3), SPECS[method]) for method in ("prompt_tuning",) * 2
    )
    assert [report.checkpoint for report in one] == [report.checkpoint for report in two]
    one, two = (run_out(engine_of("llama", method, 3), SPECS[method]) for method in ("lora",) * 2)
    assert [report.checkpoint for report in one] == [report.checkpoint for report in two]


def test_texts_are_the_same() -> None:
    """Every row gets its own text."""
    task = small_task(None, train=8, validation=9)
    texts = [[f"{row}"] for row in range(9)]
    task.splits["validation"] = replace(task.splits["validation"], references=texts)
    task.decoding = Decoding(6, num_beams=2)
    seen = []
    for cores in (1, 3):
        engine = make_engine(tiny_backbone(), task, TRAIN, SEARCH, 2, cores=cores)
        seen.append([report.metrics for report in run_out(engine, PROMPTS)])
    for one, other in zip(*seen, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_rows_run_side_by_side() -> None:
    """Two threads run the model at the same time; neither is the caller's."""
    backbone: Any = tiny_backbone()
    meeting, seen, forced = threading.Barrier(2), set(), backbone.teacher_forced

    def teacher_forced(*arguments: Any) -> Any:
        meeting.wait(30)
        seen.add(threading.current_thread().name)
        return forced(*arguments)

    engine = make_engine(backbone, small_task(), TRAIN, SEARCH, 2, cores=2)
    for place, spec in enumerate(PROMPTS):
        engine.seat(f"t{place}", spec)
    backbone.teacher_forced = teacher_forced
    engine.step(list(engine.slots.values()))
    assert len(seen) == 2 and threading.current_thread().name not in seen


def test_memory_that_runs_out_in_one_thread() -> None:
    """The step is repeated with one smaller forward at a time, with the same result.

    The report says so.
    """
    wanted = run_out(make_engine(tiny_backbone(), small_task(), TRAIN, SEARCH, 2), PROMPTS)
    backbone: Any = tiny_backbone()
    forced = backbone.teacher_forced
    running, most = [], []

    def teacher_forced(prompts: Any, inputs: Any, *rest: Any) -> Any:
        running.append(1)
        most.append(len(running))
        try:
            if len(inputs) * max(map(len, inputs)) > 40:
                most.clear()
                raise MemoryError
            time.sleep(0.001)
            return forced(prompts, inputs, *rest)
        finally:
            running.pop()

    backbone.teacher_forced = teacher_forced
    got = run_out(make_engine(backbone, small_task(), TRAIN, SEARCH, 2, cores=3), PROMPTS)
    assert max(most) == 1  # since memory last ran out
    for one, other in zip(got, wanted, strict=True):
        assert "ran out of memory and went on with forwards of at most" in one.note
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)


@pytest.mark.parametrize("generates", [False, True])
def test_a_row_a_core_is_not_the_least(generates: bool) -> None:
    """When memory holds one forward, rows are trained and evaluated one at a time.

    The trial has as many rows as there are cores.
    """
    task = small_task(None if generates else "several tokens", validation=3)
    train = TRAIN.model_copy(update={"batch_size": 2})
    if generates:
        rows = task.splits["validation"]
        task.splits["validation"] = replace(rows, references=[["no"]] * len(rows))
        task.decoding = Decoding(5)
    wanted = run_out(make_engine(tiny_backbone(), task, train, SEARCH, 1), PROMPTS[:1])
    backbone: Any = tiny_backbone()
    for name in ("teacher_forced", "start"):
        setattr(backbone, name, _for_one(getattr(backbone, name)))
    got = run_out(make_engine(backbone, task, train, SEARCH, 1, cores=2), PROMPTS[:1])
    assert [one.ending for one in got] == [one.ending for one in wanted] == [None, "steps"]
    for one, other in zip(got, wanted, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)


def _for_one(forward: Any) -> Any:
    """Wrap a forward so that it runs out of memory in any thread but the main one."""

    def checked(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return forward(*arguments)

    return checked


def test_no_more_rows_at_once_than_asked_for() -> None:
    """micro_batch_size 1 trains one row at a time on two cores; 4 trains at most two rows each."""
    for most, wanted in ((1, 1), (4, 2)):
        backbone: Any = tiny_backbone()
        forced, seen = backbone.teacher_forced, []

        def teacher_forced(
            prompts: Any, inputs: Any, *rest: Any, forced: Any = forced, seen: Any = seen
        ) -> Any:
            seen.append((len(inputs), threading.current_thread() is threading.main_thread()))
            return forced(prompts, inputs, *rest)

        train = TrainSpec(steps=4, batch_size=5, evaluate_every=4, micro_batch_size=most)
        engine = make_engine(backbone, small_task(), train, SEARCH, 1, cores=2)
        engine.seat("t", PROMPTS[0])
        backbone.teacher_forced = teacher_forced
        engine.step(list(engine.slots.values()))
        assert max(rows for rows, _ in seen) <= wanted and all(
            main == (most == 1) for _, main in seen
        )


def test_an_error_of_one_thread_is_the_steps() -> None:
    """An error is raised once the other threads have ended; the next step can use all threads."""
    threads, ended = Threads.of(3, tiny_backbone().model, torch.device("cpu")), []

    def work(part: int) -> int:
        if part == 1:
            raise KeyError("the second")
        time.sleep(0.05)
        ended.append(part)
        return part

    with pytest.raises(KeyError, match="the second"):
        threads.each(work)
    assert sorted(ended) == [0, 2]
    assert threads.each(lambda part: part) == [0, 1, 2]


def test_who_can_share_rows() -> None:
    """An accelerator, or a model that keeps state between forwards, uses one thread.

    The number of threads is limited; further cores share each thread's operations.
    """
    model: Any = backbone_of("llama", torch.float32).model
    assert (
        Threads.of(4, model, torch.device("cuda")).ways
        == Threads.of(1, model, torch.device("cpu")).ways
        == 1
    )
    assert Threads.of(64, model, torch.device("cpu")).ways == MOST
    before = model.config.rope_parameters
    model.config.rope_parameters = {**before, "rope_type": "dynamic"}
    try:
        assert Threads.of(4, model, torch.device("cpu")).ways == 1
    finally:
        model.config.rope_parameters = before


def test_dropout_is_drawn_in_one_thread() -> None:
    """Dropout depends on seed and step, not on which thread is first."""
    train = TrainSpec(steps=4, batch_size=5, evaluate_every=2, frozen_dropout=True)
    one, two = (
        run_out(engine_of("bert", "prompt_tuning", cores, train), PROMPTS[:1]) for cores in (1, 3)
    )
    assert [report.train_loss for report in one] == pytest.approx(
        [report.train_loss for report in two], rel=1e-9
    )


def test_an_evaluation_asks_every_row_once() -> None:
    """The cells of the confusion matrix add up to the rows and do not depend on the cores."""
    engines = [engine_of("llama", "prompt_tuning", cores) for cores in (1, 4)]
    reports = [run_out(engine, PROMPTS)[-1] for engine in engines]
    job = EvaluationJob("validation", reports[0].checkpoint, confusion=True)
    one, two = (engine.evaluate(job) for engine in engines)
    assert one == pytest.approx(two, rel=1e-6)
    assert sum(value for name, value in two.items() if "/" in name) == 11
