"""One search from prepared inputs to ranked trials: broker, worker groups and study, started and stopped together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.base_model import BaseModelInfo
from orchestrator.errors import JobFailed, OrchestratorError, SearchLost
from orchestrator.interrupts import undisturbed
from orchestrator.ray_threads import RayThread, alive, await_end, names
from orchestrator.search.broker import Broker, Place
from orchestrator.search.cluster_session import nodes
from orchestrator.search.growth import Growth
from orchestrator.search.history import History
from orchestrator.search.model_files import start_files
from orchestrator.search.outcome import Outcome
from orchestrator.search.placement import Placement, place
from orchestrator.search.population import Population
from orchestrator.search.prepare import Prepared
from orchestrator.search.study import Concurrency, Listener, run_study, trial_id
from orchestrator.search.worker import WorkerConfig
from orchestrator.search.worker_group import WorkerGroup
from orchestrator.space import trial_count
from orchestrator.spec import JobSpec
from orchestrator.tuning.report import EvaluationJob

log = logging.getLogger(__name__)

Value = TypeVar("Value")

CALLS = 100_000  # that the broker may have open
STOP_S = 30.0  # workers end by themselves in so long
WORKER_S = 20.0  # that trials' processes wait for a worker's at most
SEE_LOG = "run again with --verbose to see the worker's log"
HURRY_S = 3.0  # the same after an interrupt or an error
ABORT_S = 15.0  # Train ends its workers in so long; it gives them 5 s
KILL_S = 10.0  # a thread hears in so long that the process it waits for was killed


class Beside(RayThread):
    """A thread of the driver that asks the workers; ``future`` is what comes of its work."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__("search-beside")
        self.future: Future[Any] = Future()
        self._work = work

    def run(self) -> None:
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # whoever asks for the result gets it
            self.future.set_exception(error)


@dataclass
class Running:
    """A search with its workers up. Lives inside ``running``."""

    prepared: Prepared
    placement: Placement
    broker: Any
    groups: list[WorkerGroup]
    storage: Path
    concurrency: Concurrency
    threads: list[Beside] = field(default_factory=list)

    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[dict[str, float]]:
        """Metrics of baselines or prompts on their splits, by whichever worker is first; asked for all at once, so that
        no round of training comes in between."""
        metrics: list[dict[str, float]] = self._ask([self.broker.evaluation.remote(job) for job in jobs])
        return metrics

    def ready(self) -> BaseModelInfo:
        """Wait until a worker holds the backbone; what it found it to be."""
        info: BaseModelInfo = self._ask(self.broker.ready.remote())
        return info

    def places(self) -> dict[str, Place]:
        """Where each worker is, or was last."""
        places: dict[str, Place] = self._ask(self.broker.worker_places.remote())
        return places

    def slow(self) -> str:
        """What makes the search slower than its cluster is; "" if nothing does."""
        if not self.placement.gpus or all(place.device != "cpu" for place in self.places().values()):
            return ""
        return "torch sees none of the GPUs that Ray gave the workers: they train on CPUs"

    def study(self, listeners: Sequence[Listener], history: History) -> Outcome:
        """Run every trial that is not over yet; raises JobFailed when the workers are lost for good."""
        named = [(trial_id(number), spec) for number, spec in enumerate(self.prepared.trials)]
        outcome = Outcome(self.prepared.job.search, named)
        history.tell(outcome)
        # A dozen processes start for a worker, one after another, and Tune's for each slot at once. On few cores the
        # worker, which takes longest, would wait for those of trials that can't begin without it.
        self._ask(self.broker.started.remote(WORKER_S))
        try:
            run_study(
                self.prepared.job, self.prepared.trials, self.broker, self.concurrency, self.storage,
                [outcome, *listeners], history,
            )  # fmt: skip
        except ray.exceptions.RayActorError as error:
            raise _broker_lost(error) from None
        self.ready()
        return outcome

    @contextmanager
    def or_abandon(self) -> Iterator[None]:
        """Whatever ends this block early ends the waits of other threads too."""
        try:
            yield
        except BaseException:
            self.broker.fail.remote(JobFailed("the search was given up"))
            raise

    @contextmanager
    def beside(self, work: Callable[..., Value], *arguments: Any) -> Iterator[Future[Value]]:
        """Do the work in a thread, which may ask the workers, and wait for it at the end of the block.

        A block that ends early ends what the thread waits for.
        """
        thread = Beside(partial(work, *arguments))
        self.threads.append(thread)
        try:
            with undisturbed():
                thread.start()
            with self.or_abandon():
                yield thread.future
        finally:
            with undisturbed():
                await_end([thread], HURRY_S)  # one that takes longer is waited for at the search's end

    def _ask(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, OrchestratorError):
                raise cause from None
            if isinstance(error, ray.exceptions.RayActorError):
                raise _broker_lost(error) from None
            raise JobFailed(f"the search's broker failed: {first_line(error)}", SEE_LOG) from None


def placed(prepared: Prepared) -> Placement:
    """How the search lies on this cluster. BadInput when it does not fit."""
    resources = prepared.job.resources
    if prepared.job.is_baseline:  # it changes the model, or has it alone
        resources = resources.model_copy(update={"trials_per_worker": 1})
    return place(resources, nodes(), prepared.total)


@contextmanager
def running(prepared: Prepared, placement: Placement, storage: Path) -> Iterator[Running]:
    """Start the broker and the worker groups; stop them at the end, whatever happened.

    No thread that asks Ray for anything is left at the end: see ``_stop``. To be entered by ``whole``, so that no
    interrupt comes between the start of a thread and the block.
    """
    quiet_ray_loggers()
    broker = start_broker(prepared.job)
    task = ray.put(prepared.task)
    files = start_files(prepared.job.base_model)

    def lost(error: Exception) -> None:
        broker.fail.remote(worker_failure(error))

    groups: list[WorkerGroup] = []
    concurrency = Concurrency(placement.slots)

    def start(on_error: Callable[[Exception], None] = lost) -> None:
        config = WorkerConfig(f"w{len(groups)}", prepared.job, placement, broker, task, files)
        groups.append(WorkerGroup(config, storage, on_error))
        groups[-1].start()

    def grow(workers: int) -> None:
        log.info("the cluster has grown: worker group %d is started", workers)
        start(_not_needed)
        concurrency.grow(workers * placement.trials_per_worker)

    search = Running(prepared, placement, broker, groups, storage, concurrency)
    growth = None
    patience = HURRY_S
    try:
        for _ in range(placement.workers):
            start()
        growth = _growth(prepared, placement, grow)
        yield search
        patience = STOP_S
    finally:
        if growth is not None:
            growth.stop(KILL_S)
        _stop(search, patience)
        if files is not None:
            _kill(files)


def _growth(prepared: Prepared, placement: Placement, grow: Callable[[int], None]) -> Growth | None:
    """Watches for further nodes where the number of workers is ours to choose."""
    most = -(-prepared.total // placement.trials_per_worker)
    if prepared.job.resources.workers != "auto" or most <= placement.workers:
        return None
    growth = Growth(placement, most, grow)
    growth.start()
    return growth


def _not_needed(error: Exception) -> None:
    """A group on a node that came later: the search began without it, and goes on without it."""
    log.warning("a worker group on a further node ended: %s", worker_failure(error).message)


def start_broker(job: JobSpec) -> Any:
    """The broker's actor, for the job's searcher and scheduler.

    Each seated trial and each worker keeps a call of it open, so that it has to take as many as there may be.
    """
    population = Population(job) if job.search.scheduler == "pbt" else None
    # Beside the driver, so that the search outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_concurrency=CALLS, scheduling_strategy=here)(Broker).remote
    return remote(trial_count(job.search), in_turn=job.search.searcher == "optuna", population=population)


def _stop(search: Running, patience: float) -> None:
    """End the workers, the broker and every thread that waits for them, each by harsher means than the one before.

    Ray may be shut down afterwards: nothing of this search calls it any more.
    """
    broker, groups = search.broker, search.groups
    broker.finish.remote()
    places = _give_up_lost(broker)
    left = await_end(groups, patience)
    for means, seconds in ((WorkerGroup.abort, ABORT_S), (WorkerGroup.kill, KILL_S)):
        for group in groups:
            if group in left:
                means(group)
        left = _await(left, seconds)
    _free_lost(groups, places)
    _kill(broker)  # whoever still waits for an answer of it, hears so
    _await(search.threads, KILL_S)


def _await(threads: Sequence[threading.Thread], seconds: float) -> list[threading.Thread]:
    """Wait for the threads, and say which ones, since nothing else is to be seen meanwhile."""
    if living := alive(threads):
        log.info("waiting at most %.0f s for the end of %s", seconds, names(living))
    return await_end(threads, seconds)


def _give_up_lost(broker: Any) -> dict[str, Place]:
    """End those who still wait for room to start a lost worker again; where each worker is or was, if that is known."""
    try:
        lost, places = ray.get([broker.lost_controllers.remote(), broker.worker_places.remote()], timeout=HURRY_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return {}
    for controller in filter(None, lost.values()):
        _kill(controller)
    found: dict[str, Place] = places
    return found


def _kill(actor: Any) -> None:
    """End the actor's process, if Ray still answers; what ended the search matters more than that."""
    try:
        ray.kill(actor)
    except ray.exceptions.RayError as error:
        log.info("an actor can't be ended: %s", first_line(error))


def _free_lost(groups: Sequence[WorkerGroup], places: Mapping[str, Place]) -> None:
    """Free what a controller held that did not end by itself: Ray would do so only where its dashboard runs."""
    for group in groups:
        if isinstance(group.error, ray.exceptions.RayActorError) and group.worker in places:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(places[group.worker].placement_group)


def _broker_lost(error: Exception) -> SearchLost:
    return SearchLost(f"the search's broker was lost: {first_line(error)}", SEE_LOG)


def worker_failure(error: Exception) -> JobFailed:
    """What went wrong in a worker, without the layers that Ray wrapped around it."""
    if isinstance(error, ray.exceptions.RayActorError):
        return SearchLost(f"whoever started the workers was lost: {first_line(error)}", SEE_LOG)
    causes: dict[int, Exception] = getattr(error, "worker_failures", {})
    cause: BaseException = next(iter(causes.values()), error)
    text = str(getattr(cause, "cause", None) or cause).strip()
    return JobFailed(f"a worker failed: {text.splitlines()[-1] if text else type(cause).__name__}", SEE_LOG)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def quiet_ray_loggers() -> None:
    """Ray's libraries log every restart and every report; our own progress says what matters."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
