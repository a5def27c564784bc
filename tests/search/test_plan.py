"""The plan: exact arithmetic, and measurements in a separate process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from models import load, model_folder, small_task
from ray_state import eventually, holders
from small_jobs import Command, Recorder, small_job, write_job

from orchestrator.cluster.nodes import ClusterNode
from orchestrator.errors import BadInput, JobFailed
from orchestrator.job.yaml import load_job
from orchestrator.models.backbone import bytes_elsewhere
from orchestrator.search.plan import measure as measure_module
from orchestrator.search.plan.forecast import Pace
from orchestrator.search.plan.measure import (
    Bench,
    Measured,
    cut,
    in_child,
    measure,
    shortened,
    spread,
    weight_bytes,
)
from orchestrator.search.plan.plan import END_S, WORKERS_S, Plan, estimate
from orchestrator.search.plan.rehearsal import REPORT_S, Moments, Rehearsal, rehearse
from orchestrator.search.prepare import likely_trials, prepare
from orchestrator.search.run import run_job
from orchestrator.search.workers.placement import Placement, place

PLACEMENT = Placement(workers=1, cpus=1, gpus=0.0, threads=1, trials_per_worker=2)
PACE = Pace(step_alone=0.1, step_packed=0.15, evaluation_alone=1.0, evaluation_packed=1.5, packed=2)
MEASURED = Measured("cpu", PACE, 0.01, 3.0, weights=100, idle=500, usual=700, peak=900, room=1000)
FIFO = {"search__scheduler": "fifo", "search__trials": 4}


def planned(
    folder: Path,
    placement: Placement = PLACEMENT,
    measured: Measured = MEASURED,
    nodes: int = 1,
    **changes: object,
) -> Plan:
    return estimate(prepare(small_job(folder, **{**FIFO, **changes})), placement, measured, nodes)


def test_the_parts_add_up(tmp_path: Path) -> None:
    """The plan's seconds are the sums of their parts.

    Four trials of 16 steps on two slots, with an evaluation every 4 steps; baselines on 16
    validation and 16 test rows. The written instruction costs more in proportion to the longer
    rows.
    """
    plan = planned(tmp_path, search__few_shot=0)
    task = prepare(small_job(tmp_path, **FIFO, search__few_shot=0)).task
    (instructed,) = task.instructed.values()
    bare, longer = (
        sum(sum(of[name].lengths) for name in ("validation", "test"))
        for of in (task.splits, instructed)
    )
    baselines = 32 * 0.01 * (1 + longer / bare)
    search = 2 * (16 * 0.15 + 4 * (1.5 + 2 * REPORT_S))
    parts = {"startup": WORKERS_S + 3.0, "baselines": baselines, "search": search, "test": 1.0}
    assert plan.seconds == pytest.approx(
        {**parts, "end": END_S, "total": sum(parts.values()) + END_S}
    )
    assert plan.device_hours == pytest.approx((search + 1.0 + baselines) / 3600)
    assert (plan.trials, plan.most_steps, plan.forecast.steps, plan.slot) == (4, 64, 64, 200)
    assert plan.warnings == ()
    metrics = plan.metrics()
    assert metrics["plan_seconds"] == plan.seconds["total"] and metrics["plan_trained_steps"] == 64


def test_what_was_rehearsed_counts_and_what_came_before(tmp_path: Path) -> None:
    """The rehearsal's start and report times are used; the seconds before it are added."""
    prepared = prepare(small_job(tmp_path, **FIFO))
    plan = estimate(
        prepared, PLACEMENT, MEASURED, before_s=7.0, rehearsal=Rehearsal(start_s=20.0, report_s=0.5)
    )
    assert plan.seconds["startup"] == pytest.approx(27.0)
    assert plan.seconds["search"] == pytest.approx(2 * (16 * 0.15 + 4 * (1.5 + 2 * 0.5)))


def test_a_worker_holds_more_than_what_measures(tmp_path: Path) -> None:
    """Memory that the rehearsal's worker held beyond its short trials is added to each sum."""
    prepared = prepare(small_job(tmp_path, **FIFO))
    measured = replace(MEASURED, short=550)
    for held, besides in ((0, 0), (750, 200), (500, 0)):  # 0: no worker was observed
        rehearsal = Rehearsal(start_s=20.0, report_s=0.5, held=held)
        memory = estimate(prepared, PLACEMENT, measured, rehearsal=rehearsal).document()["memory"]
        found = tuple(memory[name] - besides for name in ("idle", "usual", "worker"))
        assert found == (500, 700, 900) and memory["slot"] == 200


@pytest.mark.parametrize("metric", ["roc_auc", "own_metrics:broken"])
def test_a_plan_does_without_metrics_that_need_all_rows(tmp_path: Path, metric: str) -> None:
    """A few rows may give such a metric no value, so a plan evaluates without it."""
    job = small_job(tmp_path, search__metric=metric, search__mode="max")
    prepared = prepare(job)
    short = shortened(prepared, PLACEMENT)
    assert short.job.search.metric == "loss" and short.job.search.better == "min"
    assert not Bench(prepared, PLACEMENT, load(model_folder())).largest()
    usual = prepare(small_job(tmp_path, search__metric="macro_f1"))
    assert shortened(usual, PLACEMENT).job.search.metric == "macro_f1"


def test_a_rehearsal_is_the_search_in_short(tmp_path: Path) -> None:
    """The rehearsal trains one trial per slot for two steps of one row, with any scheduler.

    Trials that a searcher would propose are drawn at random instead, and counted in the estimate.
    """
    job = small_job(tmp_path, search__searcher="optuna", search__scheduler="pbt", train__patience=1)
    prepared = prepare(job)
    short = shortened(prepared, PLACEMENT)
    assert (
        short.total, len(short.trials), short.job.search.scheduler, short.job.search.searcher,
    ) == (2, 2, "fifo", "random")  # fmt: skip
    assert (short.job.train.steps, short.job.train.batch_size, short.job.train.patience) == (
        2,
        1,
        None,
    )
    assert {name: len(split) for name, split in short.task.splits.items()} == dict.fromkeys(
        short.task.splits, 1
    )
    assert (
        short.job.base_model == job.base_model
        and len(likely_trials(prepared)) == prepared.total == 8
    )
    assert estimate(prepared, PLACEMENT, MEASURED).trials == 8


def test_a_report_s_way_is_seen_within_a_round() -> None:
    """The time of a report is measured within a round, since training lies between rounds.

    A worker with one slot never has two reports in a round; the default is used.
    """
    moments = Moments()
    moments.times = [
        (1.0, True),
        (1.25, True),
        (1.5, False),
        (9.0, True),
        (9.25, True),
        (9.75, False),
    ]
    assert (moments.first_round(), moments.report_s()) == (1.0, 0.25)
    moments.times = [(1.0, False), (9.0, False)]
    assert moments.report_s() == REPORT_S


def test_the_start_is_rehearsed(ray_cluster: None, tmp_path: Path) -> None:
    """The rehearsal runs in the running Ray with the real worker and leaves nothing behind.

    The worker holds more memory than the same trials measured without Ray.
    """
    before = holders()
    prepared = prepare(small_job(tmp_path))
    found = rehearse(prepared, PLACEMENT, tmp_path / "rehearsal")
    assert found.start_s > found.report_s > 0
    measured = measure(prepared, PLACEMENT)
    assert measured.idle <= measured.short <= measured.usual <= measured.peak
    assert measured.short < found.held < measured.short + 1e9
    assert eventually(lambda: holders() <= before)


def test_hours_count_every_device(tmp_path: Path) -> None:
    """Two workers of two accelerators each are four devices, for as long as trials run."""
    four = planned(
        tmp_path, replace(PLACEMENT, workers=2, gpus=2.0), replace(MEASURED, device="GPU")
    )
    held = sum(four.seconds[part] for part in ("baselines", "search", "test"))
    assert four.device_hours == pytest.approx(4 * held / 3600)
    assert four.seconds["search"] == pytest.approx(planned(tmp_path).seconds["search"] / 2)


def test_a_groups_workers_all_count(tmp_path: Path) -> None:
    """Two groups of two workers count as four devices and four processes.

    A warning says that their exchange of gradients is not measured.
    """
    two = replace(PLACEMENT, workers=2)
    four = planned(tmp_path, replace(two, workers_per_group=2), nodes=4)
    assert four.device_hours == pytest.approx(2 * planned(tmp_path, two, nodes=4).device_hours)
    (said,) = four.warnings
    assert "a group of 2 was measured by itself" in said and said.endswith(
        "exchange gradients comes on top"
    )
    assert (
        planned(tmp_path, replace(two, workers_per_group=2))
        .warnings[0]
        .startswith("4 workers of this machine need")
    )


def test_a_limit_of_minutes_ends_the_search(tmp_path: Path) -> None:
    """The estimate of the search is at most search.stop.minutes."""
    assert planned(tmp_path, search__stop={"minutes": 0.05}).seconds["search"] == pytest.approx(3.0)


def test_what_cannot_fit_is_named(tmp_path: Path) -> None:
    """Warnings name memory that is nearly full, cut batches and a different device.

    Memory is compared for one worker and for all workers of a machine.
    """
    (full,) = planned(tmp_path, measured=replace(MEASURED, room=950)).warnings
    assert full.startswith("a worker needs") and "lower resources.trials_per_worker" in full
    two = replace(PLACEMENT, workers=2)
    assert planned(tmp_path, two).warnings[0].startswith("2 workers of this machine need")
    assert planned(tmp_path, two, nodes=2).warnings == ()
    (cut_up,) = planned(tmp_path, measured=replace(MEASURED, cuts=("ran out",))).warnings
    assert cut_up.endswith(": ran out")
    (other,) = planned(tmp_path, replace(PLACEMENT, gpus=1.0)).warnings
    assert other.startswith("measured on a CPU")
    (early,) = planned(tmp_path, train__patience=2).warnings
    assert "patience" in early


def test_real_steps_are_measured(tmp_path: Path) -> None:
    """A child process measures the worker's time and memory; each figure includes the one before.

    Weights, idle, a usual step and the peak grow in that order.
    """
    prepared = prepare(small_job(tmp_path, **FIFO))
    found = measure(prepared, place(prepared.job.resources, [ClusterNode(2)], len(prepared.trials)))
    assert 0 < found.weights < found.idle <= found.usual <= found.peak < found.room
    assert all(
        value > 0
        for value in (found.pace.step_alone, found.pace.step_packed, found.bare_row_s, found.load_s)
    )
    assert (found.device, found.cuts, found.pace.packed) == ("cpu", (), 4)


def test_a_tied_weight_is_counted_once() -> None:
    """Embeddings that are the head's weight too have two names and one storage."""
    embeddings = torch.nn.Embedding(10, 4)
    head = torch.nn.Linear(4, 10, bias=False)
    head.weight = embeddings.weight
    assert weight_bytes(torch.nn.Sequential(embeddings, head)) == 10 * 4 * 4
    apart = torch.nn.Sequential(embeddings, torch.nn.Linear(4, 10, bias=False))
    assert weight_bytes(apart) == 2 * 10 * 4 * 4


def test_one_workers_share_is_measured(tmp_path: Path) -> None:
    """Each of two workers takes half of the rows; blocks on the other worker are subtracted."""
    prepared = prepare(
        small_job(tmp_path, **FIFO, resources__workers_per_group=2, resources__sharding="fsdp")
    )
    bench = measure_module.Bench(
        prepared, replace(PLACEMENT, workers_per_group=2), load(model_folder())
    )
    assert bench._train.batch_size == 2 and bench._scale == pytest.approx(1 / 2)
    model = load(model_folder()).model
    blocks = bytes_elsewhere(model, 2) * 4
    assert (
        0 < blocks < sum(tensor.nbytes for tensor in model.parameters())
        and bytes_elsewhere(model, 1) == 0
    )


def fails() -> None:
    raise BadInput("no such thing", "try another")


def breaks() -> None:
    raise ValueError("broken\nin two lines")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out


@pytest.mark.long
def test_what_goes_wrong_in_the_child_is_told() -> None:
    """Our own errors arrive unchanged, others as JobFailed; a kill is taken for lack of memory."""
    with pytest.raises(BadInput, match="no such thing"):
        in_child(fails)
    with pytest.raises(JobFailed, match=r"can't be measured: ValueError: broken\n"):
        in_child(breaks)
    with pytest.raises(JobFailed, match=r"exit code -9.*does not fit into memory"):
        in_child(dies)


def test_samples_lie_evenly() -> None:
    """Samples are spread evenly over the sorted values, without repeats.

    A split that is cut keeps the parts of each row together.
    """
    assert spread([9, 1, 5, 3, 7, 11], 3, key=lambda value: value) == [3, 7, 11]
    assert spread([2, 1], 5, key=lambda value: value) == [1, 2]
    split = small_task().splits["train"]
    few = cut(split, [3, 1])
    assert (few.inputs, few.targets) == (
        [split.inputs[3], split.inputs[1]],
        [split.targets[3], split.targets[1]],
    )
    assert few.labels == [split.labels[3], split.labels[1]] and few.references == []
    assert measure_module.by_length(split)[0] == split.lengths.index(max(split.lengths))


def test_the_verb(
    ray_cluster: None, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``plan`` prints a table that ends with the next step, or one JSON document; it writes no
    file."""
    job = write_job(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shown = command("plan", job, "--set", "search.trials=6", "--set", "search.searcher=optuna")
    assert shown.code == 0 and shown.out.startswith("trials") and "of at most 96" in shown.out
    assert (
        shown.out.splitlines()[-1]
        == f"next: orchestrator run {job} --set search.trials=6 --set search.searcher=optuna"
    )
    document = command("plan", job, "--json", "--quiet").document
    assert (document["trials"], document["steps"]["most"], document["placement"]["slots"]) == (
        8,
        128,
        4,
    )
    assert document["scheduler_rungs"][0] == {"step": 4, "trials": 8.0}
    assert document["seconds"]["total"] > document["seconds"]["startup"] > 0
    assert document["warnings"] == list(prepare(load_job(job)).warnings) != []
    assert all(f"warning: {text}" in shown.out for text in document["warnings"])
    assert list(Path.cwd().iterdir()) == []


def test_the_verb_refuses_what_a_run_would(command: Command, tmp_path: Path) -> None:
    """A prompt longer than the context is bad input, before anything is measured."""
    refused = command("plan", write_job(tmp_path), "--set", "search.space.num_virtual_tokens=[500]")
    assert refused.code == 2 and "exceed the context" in refused.err


def test_estimate_and_outcome_lie_side_by_side(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search with a plan logs the estimate and the outcome to its MLflow run.

    These are seconds, device hours and steps; with FIFO the estimated steps are exact.
    """
    monkeypatch.chdir(tmp_path)
    job = small_job(tmp_path, **{**FIFO, "search__trials": 2, "registry__register_top": 0})
    document = run_job(job, Recorder(job), planned=True)
    run = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(
        document["mlflow"]["run_id"]
    )
    for name in ("seconds", "device_hours", "trained_steps"):
        assert run.data.metrics[name] > 0 and run.data.metrics[f"plan_{name}"] > 0
    assert run.data.metrics["trained_steps"] == run.data.metrics["plan_trained_steps"] == 32
    assert run.data.metrics["plan_seconds"] == pytest.approx(
        document["plan"]["seconds"]["total"], abs=0.1
    )
    seconds = document["seconds"]
    assert (
        seconds["training"]
        < run.data.metrics["seconds"]
        <= seconds["total"] - seconds["plan"] + 0.01
    )
