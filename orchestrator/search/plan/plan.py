"""What a search will take, before it runs: arithmetic over what was measured on one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.nodes import Node
from orchestrator.data.encoding import Encoded
from orchestrator.job.spec import JobSpec
from orchestrator.search.plan.forecast import Forecast, forecast
from orchestrator.search.plan.measure import Measured, measure
from orchestrator.search.plan.rehearsal import REPORT_S, Rehearsal, rehearse
from orchestrator.search.prepare import EVALUATED, Prepared
from orchestrator.search.workers.placement import Placement

# Measured on two idle cores, and in them alone.
WORKERS_S = (
    8.0  # processes of Train and Tune up to the worker's own start, where no rehearsal shows it
)
END_S = 2.0  # registering
FULL = 0.9  # of a device's memory; beyond, fragments and neighbours decide


@dataclass(frozen=True)
class Plan:
    """The estimate: ``seconds`` by part and ``device_hours`` of all workers; memory in bytes."""

    placement: Placement
    trials: int
    most_steps: int
    forecast: Forecast
    measured: Measured
    seconds: dict[str, float]
    device_hours: float
    warnings: tuple[str, ...]
    data_warnings: tuple[str, ...] = ()
    """What ``prepare`` said of the data."""

    @property
    def slot(self) -> int:
        """A slot's share of a worker's memory, beyond what the base model takes."""
        return (self.measured.peak - self.measured.idle) // self.placement.trials_per_worker

    def document(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        placement, measured, pace, found = (
            self.placement,
            self.measured,
            self.measured.pace,
            self.forecast,
        )
        return {
            "trials": self.trials,
            "scheduler_rungs": [
                {"step": step, "trials": round(trials, 1)}
                for step, trials in zip(found.rungs, found.reached, strict=True)
            ],
            "steps": {"expected": round(found.steps), "most": self.most_steps},
            "placement": {**asdict(placement), "slots": placement.slots, "device": measured.device},
            "memory": {
                "weights": measured.weights, "idle": measured.idle, "slot": self.slot, "usual": measured.usual,
                "worker": measured.peak, "room": measured.room,
            },
            "pace": {
                "step_alone": pace.step_alone, "step_packed": pace.step_packed,
                "evaluation_alone": pace.evaluation_alone, "evaluation_packed": pace.evaluation_packed,
            },
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "device_hours": self.device_hours,
            "warnings": [*self.data_warnings, *self.warnings],
        }  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """The estimate as metrics of the search's MLflow run, beside those of the outcome."""
        return {
            "plan_seconds": self.seconds["total"], "plan_device_hours": self.device_hours,
            "plan_trained_steps": self.forecast.steps, "plan_worker_bytes": float(self.measured.usual),
            "plan_worker_bytes_most": float(self.measured.peak),
        }  # fmt: skip


def make_plan(
    prepared: Prepared,
    placement: Placement,
    nodes: Sequence[Node],
    before_s: float,
    storage: Path | None,
) -> Plan:
    """Measure the job and estimate. JobFailed when it can't be measured.

    ``before_s`` is what came before, from the program's start to a Ray that is up. The search's start is rehearsed in
    that Ray, which may write to ``storage``; without one it is not.
    """
    rehearsal = None if storage is None else rehearse(prepared, placement, storage)
    return estimate(
        prepared, placement, measure(prepared, placement), len(nodes), before_s, rehearsal
    )


def estimate(
    prepared: Prepared,
    placement: Placement,
    measured: Measured,
    nodes: int = 1,
    before_s: float = 0.0,
    rehearsal: Rehearsal | None = None,
) -> Plan:
    """The plan that follows from what was measured; the workers are spread evenly over so many ``nodes``."""
    rehearsal = rehearsal or Rehearsal(WORKERS_S + measured.load_s, REPORT_S)
    measured = in_worker(measured, rehearsal.held)
    job, trials = prepared.job, prepared.total
    # What trains nothing is evaluated once.
    train = (
        job.train.model_copy(update={"steps": 1, "evaluate_every": 1})
        if prepared.task.designs
        else job.train
    )
    found = forecast(
        job.search,
        train,
        trials,
        placement.workers,
        placement.trials_per_worker,
        measured.pace,
        rehearsal.report_s,
    )
    seconds = _seconds(prepared, measured, found, before_s + rehearsal.start_s)
    held = sum(seconds[part] for part in ("baselines", "search", "test"))
    return Plan(
        placement, trials, trials * train.steps, found, measured, seconds,
        device_hours(placement, held), _warnings(job, placement, measured, -(-placement.processes // nodes)),
        prepared.warnings,
    )  # fmt: skip


def in_worker(measured: Measured, held: int) -> Measured:
    """What was measured by itself, with what a worker holds besides (Ray, and what came with it).

    ``held``: bytes of a worker that ran the trials cut short; 0 for not known.
    """
    besides = max(0, held - measured.short) if held else 0
    return replace(
        measured,
        idle=measured.idle + besides,
        usual=measured.usual + besides,
        peak=measured.peak + besides,
    )


def device_hours(placement: Placement, seconds: float) -> float:
    """Hours of all accelerators, or of all workers where there are none."""
    return placement.processes * (placement.gpus or 1.0) * seconds / 3600


def _seconds(
    prepared: Prepared, measured: Measured, found: Forecast, startup: float
) -> dict[str, float]:
    splits, registry = prepared.task.splits, prepared.job.registry
    rows = sum(_rows(splits, name) for name in EVALUATED) * _baselines(prepared)
    tuned = measured.pace.evaluation_alone * _rows(splits, "test") / _rows(splits, "validation")
    limit = prepared.job.search.stop.minutes
    parts = {
        "startup": startup,
        "baselines": rows * measured.bare_row_s,
        "search": found.seconds if limit is None else min(found.seconds, 60 * limit),
        "test": tuned * max(1, registry.register_top),
        "end": END_S,
    }
    return {**parts, "total": sum(parts.values())}


def _baselines(prepared: Prepared) -> float:
    """Baselines as multiples of the one without a prompt: what stands in front of the rows costs what it is long."""
    bare = sum(sum(prepared.task.splits[name].lengths) for name in EVALUATED)
    return (
        1
        + sum(
            sum(splits[name].lengths)
            for splits in prepared.task.instructed.values()
            for name in EVALUATED
        )
        / bare
    )


def _rows(splits: dict[str, Encoded], name: str) -> int:
    return len(splits[name])


def _warnings(
    job: JobSpec, placement: Placement, measured: Measured, together: int
) -> tuple[str, ...]:
    """What can't fit, or makes the estimate worth little; ``together`` workers share a machine."""
    found = [f"the largest step and evaluation: {cut}" for cut in measured.cuts]
    on_cpu = measured.device == "cpu"
    if placement.gpus and on_cpu:
        found.append(
            "measured on a CPU, while workers get accelerators: times and memory say little about them"
        )
    elif (need := measured.peak * (together if on_cpu else 1)) > FULL * measured.room:
        what = (
            f"{together} workers of this machine need"
            if on_cpu and together > 1
            else "a worker needs"
        )
        found.append(
            f"{what} {need / 1e9:.1f} GB of {measured.room / 1e9:.1f} GB: lower resources.trials_per_worker or "
            "train.batch_size, or set train.micro_batch_size"
        )
    if placement.workers_per_group > 1:
        sent = (
            "gradients and every block's weights"
            if job.resources.sharding == "fsdp"
            else "gradients"
        )
        found.append(
            f"one worker's share of a group of {placement.workers_per_group} was measured by itself: the time in which "
            f"they exchange {sent} comes on top"
        )
    if job.train.patience is not None or job.search.stop.metric is not None:
        found.append(
            "train.patience and search.stop.metric are not counted on: they may end the search earlier"
        )
    return tuple(found)
