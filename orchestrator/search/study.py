"""The study: Ray Tune over a fixed list of trials. The only importer of ray.tune.

A Tune trial is light: a class trainable whose actor is reused, which submits its configuration to the broker and then
relays reports. It imports no torch and holds no model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, Stopper, TuneConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.search.placement import TRIAL_CPUS
from orchestrator.space import TrialSpec
from orchestrator.spec import JobSpec
from orchestrator.tuning.report import Report

STEP = "step"  # the schedulers' clock: Tune's own iteration count starts over after a restore
SCORE = "score"  # the best validation metric so far


def trial_id(number: int) -> str:
    return f"t{number:03d}"


class Listener(Protocol):
    """Hears of every trial in the order of events; called in the driver."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None: ...

    def trial_reported(self, trial: str, report: Report) -> None: ...

    def trial_ended(self, trial: str, status: str, note: str) -> None: ...


class RelayTrial(tune.Trainable):
    """A Tune trial: submits itself to the broker, then hands on one report a step."""

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker
        self._submit(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._submit(new_config)
        return True

    def _submit(self, config: dict[str, Any]) -> None:
        self._trial = trial_id(config["trial"]["number"])
        ray.get(self._broker.submit.remote(self._trial, config["trial"]["number"], config["trial"]["config"]))

    def step(self) -> dict[str, Any]:
        report: Report = ray.get(self._broker.next_report.remote(self._trial))
        return {STEP: report.step, SCORE: report.score, "report": report, "done": report.ending is not None}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The broker keeps the newest checkpoint of every trial; Tune needs none of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial that starts again goes on from the broker's checkpoint."""


class _Relay(Callback):
    """Tells the broker at once what Tune decided, and the listeners what happened."""

    def __init__(self, broker: Any, listeners: Sequence[Listener]) -> None:
        self._broker = broker
        self._listeners = listeners
        self._last: dict[str, Report] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes its callbacks to disk, to restore them; a restored study is given new listeners."""
        return type(self), (None, ())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        asked = trial.config["trial"]
        for listener in self._listeners:
            listener.trial_started(trial_id(asked["number"]), TrialSpec.from_config(asked["config"]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        report = self._last[trial.trial_id] = result.pop("report")
        self._broker.decide.remote(report.trial, not result.get("done"))
        for listener in self._listeners:
            listener.trial_reported(report.trial, report)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        report = self._last.get(trial.trial_id)
        if report is None:
            return
        status = "finished" if report.ending in ("steps", "patience") else "stopped"
        note = f"diverged at step {report.step}" if report.ending == "diverged" else report.ending or "by the scheduler"
        for listener in self._listeners:
            listener.trial_ended(report.trial, status, note)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial_id(trial.config["trial"]["number"])
        self._broker.decide.remote(name, False)
        for listener in self._listeners:
            listener.trial_ended(name, "failed", "see the search's log")


class _Targets(Stopper):
    """Ends the search when its metric or its minutes are reached."""

    def __init__(self, job: JobSpec) -> None:
        self._metric, self._minutes = job.search.stop.metric, job.search.stop.minutes
        self._sign = 1.0 if job.search.better == "max" else -1.0
        self._started = time.monotonic()
        self._reached = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self._metric is not None and self._sign * result[SCORE] >= self._sign * self._metric:
            self._reached = True
        return self.stop_all()

    def stop_all(self) -> bool:
        late = self._minutes is not None and time.monotonic() - self._started > 60 * self._minutes
        return self._reached or late


def scheduler(job: JobSpec) -> TrialScheduler:
    """The spec's scheduler, on our own step count."""
    common = {"time_attr": STEP, "metric": SCORE, "mode": job.search.better}
    grace = job.search.grace_steps or job.train.evaluate_every
    if job.search.scheduler == "asha":
        rungs = {"grace_period": min(grace, job.train.steps), "reduction_factor": job.search.reduction_factor}
        return ASHAScheduler(max_t=job.train.steps, **rungs, **common)
    if job.search.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, min_samples_required=3, **common)
    return FIFOScheduler()


def run_study(
    job: JobSpec, trials: Sequence[TrialSpec], broker: Any, slots: int, storage: Path, listeners: Sequence[Listener]
) -> None:
    """Run all trials to their end; listeners hear of them. Returns when Tune has no trial left."""
    space = tune.grid_search([{"number": number, "config": spec.config()} for number, spec in enumerate(trials)])
    trainable = tune.with_resources(
        tune.with_parameters(RelayTrial, broker=broker), tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}])
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": space},
        tune_config=TuneConfig(scheduler=scheduler(job), max_concurrent_trials=slots, reuse_actors=True),
        run_config=RunConfig(
            name="tune",
            storage_path=str(storage),
            stop=_Targets(job),
            callbacks=[_Relay(broker, listeners)],
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()
