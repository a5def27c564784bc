"""A running search: the broker, the worker groups and the study, started and stopped together.

It takes the prepared inputs and returns the trials with their results.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import ray
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import actors
from orchestrator.cluster.actors import Reference
from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.ray_internals.settings import quiet_search_loggers
from orchestrator.cluster.ray_threads import RayThread, alive, await_end, names
from orchestrator.errors import JobFailed, OrchestratorError, SearchLost
from orchestrator.job.space import TrialSpec, trial_count
from orchestrator.job.spec import JobSpec, StopSpec
from orchestrator.models.source import BaseModelInfo
from orchestrator.search.prepare import Prepared
from orchestrator.search.state.events import Listener
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import Outcome, trial_id
from orchestrator.search.study.population import Population
from orchestrator.search.study.study import Concurrency, run_study
from orchestrator.search.workers.broker import Broker, BrokerHandle, Place
from orchestrator.search.workers.model_files import start_files
from orchestrator.search.workers.placement import Placement, place
from orchestrator.search.workers.scale_up import ScaleUp
from orchestrator.search.workers.train_group import WorkerGroup
from orchestrator.search.workers.worker import WorkerConfig
from orchestrator.tuning.reports import EvaluationJob
from orchestrator.utils.interrupts import undisturbed
from orchestrator.utils.text import first_line, last_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from orchestrator.search.workers.model_files import ModelFilesHandle
    from orchestrator.tuning.engine import Task

log = logging.getLogger(__name__)

Value = TypeVar("Value")

CALLS = 100_000  # most calls that the broker may have open
STOP_S = 30.0  # time for workers to end by themselves after a search that completed
WORKER_S = 20.0  # longest wait for the first worker's process before the trials' are started
SEE_LOG = "run again with --verbose to see the worker's log"
HURRY_S = 3.0  # time for workers to end by themselves after an interrupt or an error
ABORT_S = 15.0  # time for Train to end its workers, which it gives 5 s
KILL_S = 10.0  # time for a thread to notice that the process it waits for was killed


class Beside(RayThread, Generic[Value]):
    """A thread of the driver that calls the workers; ``future`` holds the result of its work."""

    def __init__(self, work: Callable[[], Value]) -> None:
        super().__init__("search-beside")
        self.future: Future[Value] = Future()
        self._work = work

    def run(self) -> None:
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # raised where the future's result is read
            self.future.set_exception(error)


@dataclass
class Running:
    """A search whose workers are up. It is valid inside the context ``running``."""

    prepared: Prepared
    placement: Placement
    broker: BrokerHandle
    groups: list[WorkerGroup]
    storage: Path
    concurrency: Concurrency
    threads: list[Beside[Any]] = field(default_factory=list)

    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[dict[str, float]]:
        """Evaluate baselines or prompts on their splits, each by the first free worker.

        All jobs are queued at once, so that no round of training comes in between.
        """
        with _own_errors():
            return actors.get([self.broker.evaluation.remote(job) for job in jobs])

    def ready(self) -> BaseModelInfo:
        """Wait until a worker has loaded the backbone, and return its description."""
        with _own_errors():
            info = actors.get(self.broker.ready.remote())
        assert info is not None  # every worker describes its backbone as it joins
        return info

    def places(self) -> dict[str, Place]:
        """Return the current or last place of each worker."""
        with _own_errors():
            return actors.get(self.broker.worker_places.remote())

    def slow(self) -> str:
        """Say why the search is slower than its cluster allows; "" if it is not."""
        if not self.placement.gpus or all(
            place.device != "cpu" for place in self.places().values()
        ):
            return ""
        return "torch sees none of the GPUs that Ray gave the workers: they train on CPUs"

    def study(self, listeners: Sequence[Listener], history: History) -> Outcome:
        """Run every trial that is not over yet, and return the outcome of all trials.

        Raises JobFailed when the workers are lost for good, SearchLost when the broker is.
        """
        named = [(trial_id(number), spec) for number, spec in enumerate(self.prepared.trials)]
        outcome = Outcome(named)
        history.tell(outcome)
        # A worker takes a dozen processes, which start one after another; Tune starts a process for
        # each slot at once. On few cores the worker, which takes longest, would wait for the
        # processes of trials that can't begin without it.
        with _own_errors():
            actors.get(self.broker.started.remote(WORKER_S))
        try:
            run_study(
                self.prepared.job, self.prepared.trials, self.broker, self.concurrency,
                self.storage, [outcome, *listeners], history.part(confirming=False),
            )  # fmt: skip
        except ray.exceptions.RayActorError as error:
            raise _broker_lost(error) from None
        self.ready()
        return outcome

    def confirm(
        self, trials: Sequence[TrialSpec], listeners: Sequence[Listener], history: History
    ) -> None:
        """Run the trials that confirm others, each to its end, after the trials of the search.

        Nothing stops them early. Raises JobFailed and SearchLost as ``study`` does.
        """
        job = self.prepared.job
        changes = {"searcher": "random", "scheduler": "fifo", "stop": StopSpec()}
        plain = job.model_copy(update={"search": job.search.model_copy(update=changes)})
        try:
            run_study(
                plain, trials, self.broker, self.concurrency, self.storage / "confirmation",
                listeners, history.part(confirming=True), first=self.prepared.total,
            )  # fmt: skip
        except ray.exceptions.RayActorError as error:
            raise _broker_lost(error) from None
        self.ready()

    @contextmanager
    def or_abandon(self) -> Iterator[None]:
        """End the waits of other threads if an error or interrupt ends this block early."""
        try:
            yield
        except BaseException:
            self.broker.fail.remote(JobFailed("the search was given up"))
            raise

    @contextmanager
    def beside(self, work: Callable[..., Value], *arguments: Any) -> Iterator[Future[Value]]:
        """Do the work in a thread that may call the workers, and join it at the end of the block.

        A block that ends early also ends what the thread waits for.
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
                # A thread that takes longer is waited for at the end of the search.
                await_end([thread], HURRY_S)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn Ray's errors of calls to the broker into errors of this project."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OrchestratorError):
            raise cause from None
        if isinstance(error, ray.exceptions.RayActorError):
            raise _broker_lost(error) from None
        raise JobFailed(f"the search's broker failed: {first_line(error)}", SEE_LOG) from None


def place_search(prepared: Prepared) -> Placement:
    """Place the search on this cluster. Raises BadInput when it does not fit."""
    resources = prepared.job.resources
    if prepared.job.is_baseline:  # a baseline method changes the model, or needs it to itself
        resources = resources.model_copy(update={"trials_per_worker": 1})
    return place(resources, nodes(), prepared.total)


@contextmanager
def running(prepared: Prepared, placement: Placement, storage: Path) -> Iterator[Running]:
    """Start the broker and the worker groups, and stop them at the end, whatever happened.

    No thread that calls Ray is left at the end: see ``_stop``. Enter this context with ``whole``,
    so that no interrupt comes between the start of a thread and the block.
    """
    quiet_search_loggers()
    broker = start_broker(prepared.job)
    task: Reference[Task] = ray.put(prepared.task)
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


def _growth(
    prepared: Prepared, placement: Placement, grow: Callable[[int], None]
) -> ScaleUp | None:
    """Watch for further nodes if ``resources.workers`` is auto and trials would use more groups."""
    most = -(-prepared.total // placement.trials_per_worker)
    if prepared.job.resources.workers != "auto" or most <= placement.workers:
        return None
    growth = ScaleUp(placement, most, grow)
    growth.start()
    return growth


def _not_needed(error: Exception) -> None:
    """Log the end of a group on a node that came later: the search goes on without this group."""
    log.warning("a worker group on a further node ended: %s", worker_failure(error).message)


def start_broker(job: JobSpec) -> BrokerHandle:
    """Start the broker's actor for the job's searcher and scheduler.

    Each seated trial and each worker keeps a call to the broker open, so it must accept as many
    calls at a time as there may be of both.
    """
    population = Population(job) if job.search.scheduler == "pbt" else None
    # The broker runs on the driver's node, so that the search outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_concurrency=CALLS, scheduling_strategy=here)(Broker).remote
    broker = remote(trial_count(job.search), in_turn=job.search.proposes, population=population)
    return cast(BrokerHandle, broker)


def _stop(search: Running, patience: float) -> None:
    """End the workers, the broker and every thread that waits for them.

    Workers are told to stop first; Train then aborts those that remain, and the last are killed.
    Ray may be shut down afterwards, since nothing of this search calls it any more.
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
    _kill(broker)  # calls that still wait for its answer end with an error
    _await(search.threads, KILL_S)


def _await(threads: Sequence[threading.Thread], seconds: float) -> list[threading.Thread]:
    """Wait for the threads, and log their names, since nothing else is shown meanwhile."""
    if living := alive(threads):
        log.info("waiting at most %.0f s for the end of %s", seconds, names(living))
    return await_end(threads, seconds)


def _give_up_lost(broker: BrokerHandle) -> dict[str, Place]:
    """End the controllers that still wait for room to restart a lost worker.

    Returns the current or last place of each worker; empty if the broker does not answer.
    """
    try:
        lost, places = ray.get(
            [broker.lost_controllers.remote(), broker.worker_places.remote()], timeout=HURRY_S
        )
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return {}
    for controller in filter(None, lost.values()):
        _kill(controller)
    found: dict[str, Place] = places
    return found


def _kill(actor: ActorHandle | BrokerHandle | ModelFilesHandle) -> None:
    """End the actor's process if Ray still answers.

    A failure is only logged, because the error that ended the search matters more.
    """
    try:
        ray.kill(actor)
    except ray.exceptions.RayError as error:
        log.info("an actor can't be ended: %s", first_line(error))


def _free_lost(groups: Sequence[WorkerGroup], places: Mapping[str, Place]) -> None:
    """Free the placement groups of controllers that died.

    Ray frees such a group by itself only where its dashboard runs.
    """
    for group in groups:
        if isinstance(group.error, ray.exceptions.RayActorError) and group.worker in places:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(places[group.worker].placement_group)


def _broker_lost(error: Exception) -> SearchLost:
    return SearchLost(f"the search's broker was lost: {first_line(error)}", SEE_LOG)


def worker_failure(error: Exception) -> JobFailed:
    """Make an error of a worker's failure, without the layers that Ray wraps around its cause.

    The error is SearchLost if a group's controller was lost.
    """
    if isinstance(error, ray.exceptions.RayActorError):
        return SearchLost(f"whoever started the workers was lost: {first_line(error)}", SEE_LOG)
    causes: dict[int, Exception] = getattr(error, "worker_failures", {})
    cause: BaseException = next(iter(causes.values()), error)
    return JobFailed(
        f"a worker failed: {last_line(getattr(cause, 'cause', None) or cause)}", SEE_LOG
    )
