"""The estimate of a search's time and memory, computed from measurements on one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.cluster.nodes import ClusterNode
from orchestrator.data.encoding import Encoded
from orchestrator.job.space import confirming_total
from orchestrator.job.spec import JobSpec
from orchestrator.search.plan.forecast import Forecast, forecast
from orchestrator.search.plan.measure import Measured, measure
from orchestrator.search.plan.rehearsal import REPORT_S, Rehearsal, rehearse
from orchestrator.search.prepare import EVALUATED, Prepared
from orchestrator.search.workers.placement import Placement
from orchestrator.utils.documents import JsonObject

# Both times were measured on two idle cores.
WORKERS_S = 8.0  # seconds of Train and Tune until the worker starts, if there is no rehearsal
END_S = 2.0  # seconds to register the result
# The share of a device's memory that can be relied on; beyond it, fragmentation and other
# processes decide whether a job fits.
FULL = 0.9


@dataclass(frozen=True)
class Plan:
    """An estimate of a search: ``seconds`` by part, ``device_hours`` of all workers, and memory.

    Memory is in bytes.
    """

    placement: Placement
    trials: int
    most_steps: int
    forecast: Forecast
    measured: Measured
    seconds: dict[str, float]
    device_hours: float
    warnings: tuple[str, ...]
    data_warnings: tuple[str, ...] = ()
    """The warnings of ``prepare`` about the data."""
    confirming: int = 0
    """Number of the trials that confirm others, which come after ``trials``."""
    confirmation: Forecast | None = None

    @property
    def steps(self) -> float:
        """The expected steps of all trials."""
        return self.forecast.steps + (self.confirmation.steps if self.confirmation else 0.0)

    @property
    def slot(self) -> int:
        """A slot's share of a worker's memory beyond the base model, in bytes."""
        return (self.measured.peak - self.measured.idle) // self.placement.trials_per_worker

    def document(self) -> JsonObject:
        """Return the document that ``plan --json`` prints."""
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
            **({"confirming_trials": self.confirming} if self.confirmation else {}),
            "steps": {"expected": round(self.steps), "most": self.most_steps},
            "placement": {**asdict(placement), "slots": placement.slots, "device": measured.device},
            "memory": {
                "weights": measured.weights, "idle": measured.idle, "slot": self.slot,
                "usual": measured.usual, "worker": measured.peak, "room": measured.room,
            },
            "pace": {
                "step_alone": pace.step_alone, "step_packed": pace.step_packed,
                "evaluation_alone": pace.evaluation_alone,
                "evaluation_packed": pace.evaluation_packed,
            },
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "device_hours": self.device_hours,
            "warnings": [*self.data_warnings, *self.warnings],
        }  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Return the estimate as metrics for the search's MLflow run, beside the outcome's."""
        return {
            "plan_seconds": self.seconds["total"], "plan_device_hours": self.device_hours,
            "plan_trained_steps": self.steps,
            "plan_worker_bytes": float(self.measured.usual),
            "plan_worker_bytes_most": float(self.measured.peak),
        }  # fmt: skip


def make_plan(
    prepared: Prepared,
    placement: Placement,
    nodes: Sequence[ClusterNode],
    before_s: float,
    storage: Path | None,
) -> Plan:
    """Measure the job and estimate the search. Raises JobFailed when the job can't be measured.

    ``before_s`` are the seconds from the program's start until Ray was up. The search's start is
    rehearsed in that Ray, with ``storage`` as its folder; without ``storage`` there is no
    rehearsal.
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
    """Compute the plan from the measurements.

    ``nodes`` is the number of nodes, over which the workers are assumed to be spread evenly.
    """
    rehearsal = rehearsal or Rehearsal(WORKERS_S + measured.load_s, REPORT_S)
    measured = in_worker(measured, rehearsal.held)
    job, trials = prepared.job, prepared.total
    # Written prompts train nothing and are evaluated once.
    train = (
        job.train.model_copy(update={"steps": 1, "evaluate_every": 1})
        if set(job.methods) == {"prompt_design"}
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
    confirming, confirmation = confirming_total(job.search), None
    if confirming:
        confirmation = forecast(
            job.search.model_copy(update={"scheduler": "fifo"}),
            train,
            confirming,
            placement.workers,
            placement.trials_per_worker,
            measured.pace,
            rehearsal.report_s,
        )
    seconds = _seconds(prepared, measured, found, confirmation, before_s + rehearsal.start_s)
    parts = ("baselines", "search", "confirmation", "test")
    held = sum(seconds.get(part, 0.0) for part in parts)
    return Plan(
        placement, trials, (trials + confirming) * train.steps, found, measured, seconds,
        device_hours(placement, held),
        _warnings(job, placement, measured, -(-placement.processes // nodes)),
        prepared.warnings, confirming, confirmation,
    )  # fmt: skip


def in_worker(measured: Measured, held: int) -> Measured:
    """Add to the measured memory what a worker holds besides, such as Ray and its imports.

    ``held`` is the memory in bytes of a worker that ran the trials of the rehearsal, or 0 if it is
    unknown.
    """
    besides = max(0, held - measured.short) if held else 0
    return replace(
        measured,
        idle=measured.idle + besides,
        usual=measured.usual + besides,
        peak=measured.peak + besides,
    )


def device_hours(placement: Placement, seconds: float) -> float:
    """Return the hours of all accelerators together, or of all workers if there are none."""
    return placement.processes * (placement.gpus or 1.0) * seconds / 3600


def _seconds(
    prepared: Prepared,
    measured: Measured,
    found: Forecast,
    confirmation: Forecast | None,
    startup: float,
) -> dict[str, float]:
    """Estimate the seconds of each part of the search, and their total."""
    splits, registry = prepared.task.splits, prepared.job.registry
    rows = sum(_rows(splits, name) for name in EVALUATED) * _baselines(prepared)
    tuned = measured.pace.evaluation_alone * _rows(splits, "test") / _rows(splits, "validation")
    limit = prepared.job.search.stop.minutes
    parts = {
        "startup": startup,
        "baselines": rows * measured.bare_row_s,
        "search": found.seconds if limit is None else min(found.seconds, 60 * limit),
        **({"confirmation": confirmation.seconds} if confirmation else {}),
        "test": tuned * max(1, registry.register_top),
        "end": END_S,
    }
    return {**parts, "total": sum(parts.values())}


def _baselines(prepared: Prepared) -> float:
    """Return the cost of all baselines as a multiple of the baseline without a prompt.

    The cost grows with the number of tokens, including the text in front of the rows.
    """
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
    """Write the warnings about what won't fit and what makes the estimate unreliable.

    ``together`` workers share a machine.
    """
    found = [f"the largest step and evaluation: {cut}" for cut in measured.cuts]
    on_cpu = measured.device == "cpu"
    if placement.gpus and on_cpu:
        found.append(
            "measured on a CPU, while workers get accelerators: "
            "times and memory say little about them"
        )
    elif (need := measured.peak * (together if on_cpu else 1)) > FULL * measured.room:
        what = (
            f"{together} workers of this machine need"
            if on_cpu and together > 1
            else "a worker needs"
        )
        found.append(
            f"{what} {need / 1e9:.1f} GB of {measured.room / 1e9:.1f} GB: "
            "lower resources.trials_per_worker or "
            "train.batch_size, or set train.micro_batch_size"
        )
    if placement.workers_per_group > 1:
        sent = (
            "gradients and every block's weights"
            if job.resources.sharding == "fsdp"
            else "gradients"
        )
        found.append(
            f"one worker's share of a group of {placement.workers_per_group} "
            f"was measured by itself: the time in which they exchange {sent} comes on top"
        )
    if job.train.patience is not None or job.search.stop.metric is not None:
        found.append(
            "train.patience and search.stop.metric are not counted on: "
            "they may end the search earlier"
        )
    return tuple(found)
