"""One search from prepared inputs to ranked trials: broker, worker groups and study, started and stopped together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.base_model import BaseModelInfo
from orchestrator.errors import JobFailed
from orchestrator.search.broker import Broker
from orchestrator.search.cluster_session import nodes
from orchestrator.search.outcome import Outcome
from orchestrator.search.placement import Placement, place
from orchestrator.search.prepare import Prepared
from orchestrator.search.study import Listener, run_study, trial_id
from orchestrator.search.worker import WorkerConfig, WorkerGroup
from orchestrator.tuning.report import EvaluationJob

STOP_S = 30.0


@dataclass
class Running:
    """A search with its workers up. Lives inside ``running``."""

    prepared: Prepared
    placement: Placement
    broker: Any
    groups: list[WorkerGroup]
    storage: Path

    def evaluate(self, job: EvaluationJob) -> dict[str, float]:
        """Metrics of a baseline or a prompt on a split, by whichever worker is first."""
        metrics: dict[str, float] = self._ask(self.broker.evaluation.remote(job))
        return metrics

    def base_model(self) -> BaseModelInfo:
        """What the workers found the backbone to be; known after the first evaluation."""
        info: BaseModelInfo = ray.get(self.broker.base_model_info.remote())
        return info

    def study(self, listeners: Sequence[Listener]) -> Outcome:
        """Run every trial; raises JobFailed when the workers are lost for good."""
        named = [(trial_id(number), spec) for number, spec in enumerate(self.prepared.trials)]
        outcome = Outcome(self.prepared.job.search, named)
        run_study(
            self.prepared.job, self.prepared.trials, self.broker, self.placement.slots, self.storage,
            [outcome, *listeners],
        )  # fmt: skip
        self._raise_lost_workers()
        return outcome

    def _ask(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._raise_lost_workers()
            raise error.as_instanceof_cause() from None

    def _raise_lost_workers(self) -> None:
        for group in self.groups:
            if group.error is not None:
                raise worker_failure(group.error)


@contextmanager
def running(prepared: Prepared, storage: Path) -> Iterator[Running]:
    """Start the broker and the worker groups; stop them at the end, whatever happened."""
    quiet_ray_loggers()
    placement = place(prepared.job.resources, nodes(), len(prepared.trials))
    broker = ray.remote(num_cpus=0, max_concurrency=1000)(Broker).remote(len(prepared.trials))
    task = ray.put(prepared.task)

    def lost(error: Exception) -> None:
        broker.fail.remote(worker_failure(error).message)

    groups = [
        WorkerGroup(WorkerConfig(f"w{number}", prepared.job, placement, broker, task), storage, lost)
        for number in range(placement.workers)
    ]
    for group in groups:
        group.start()
    try:
        yield Running(prepared, placement, broker, groups, storage)
    finally:
        _stop(broker, groups)


def _stop(broker: Any, groups: list[WorkerGroup]) -> None:
    broker.finish.remote()
    deadline = time.monotonic() + STOP_S
    for group in groups:
        group.join(max(0.0, deadline - time.monotonic()))
    ray.kill(broker)


def worker_failure(error: Exception) -> JobFailed:
    """What went wrong in a worker, without the layers that Ray wrapped around it."""
    causes: dict[int, Exception] = getattr(error, "worker_failures", {})
    cause: BaseException = next(iter(causes.values()), error)
    text = str(getattr(cause, "cause", None) or cause).strip()
    return JobFailed(
        f"a worker failed: {text.splitlines()[-1] if text else type(cause).__name__}",
        "run again with --verbose to see the worker's log",
    )


def quiet_ray_loggers() -> None:
    """Ray's libraries log every restart and every report; our own progress says what matters."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
