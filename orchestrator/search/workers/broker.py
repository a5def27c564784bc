"""The broker, which connects Ray Tune's trials with the slots of Ray Train's workers.

It hands trials to worker slots, carries reports back, and keeps every trial's newest checkpoint. It
is one asyncio object: an actor in a cluster, a plain object in tests. It has three kinds of
callers:

* trials (Ray Tune trainables) ``submit`` themselves and then wait in ``next_report``;
* workers (Ray Train) ``join`` and then loop in ``next_orders``, bringing their reports along;
* the driver passes on Tune's decision on each report to ``decide``, asks for an ``evaluation``, and
  calls ``finish``.

A search on one worker repeats exactly, because the broker lets nothing race. After a round it hands
out the reports one by one, in the order of the trials, and waits for Tune's decision on each. Then
it waits for the trials that Tune starts in the freed slots. Only then does the next round begin. If
trials are proposed from the results of others (``in_turn``), the broker also waits for each trial
that replaces an ended one before it hands out the next report. These waits take milliseconds and
have a limit: a trial that never comes costs time once, and the repeatability, but never the search.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.cluster.actors import ActorMethod
from orchestrator.errors import JobFailed, OrchestratorError
from orchestrator.job.space import TrialSpec
from orchestrator.search.state.trials import TrialRecord
from orchestrator.search.study.population import CopyDecision, Population
from orchestrator.tuning.meter import Reading
from orchestrator.tuning.reports import Copied, EvaluationJob, Report

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

    from orchestrator.models.source import BaseModelInfo

PATIENCE_S = 60.0  # the longest wait for a decision or for a trial to start
IMPATIENCE_S = 0.5  # the longest such wait after one has run out


@dataclass(frozen=True)
class SeatOrder:
    """An order to seat a trial in a worker's slot, from its newest checkpoint if it has one."""

    trial: str
    spec: TrialSpec
    checkpoint: bytes | None


@dataclass(frozen=True)
class Orders:
    """The next work of a worker: free and fill slots, then evaluate or train a round; or stop."""

    free: tuple[str, ...] = ()
    seat: tuple[SeatOrder, ...] = ()
    evaluate: tuple[tuple[int, EvaluationJob], ...] = ()
    stop: bool = False


@dataclass(frozen=True)
class Place:
    """The location of a worker: node id, Ray placement group, and type of device it trains on."""

    node: str
    placement_group: PlacementGroup | None
    device: str = "cpu"

    def shown(self) -> dict[str, str]:
        """Return the node and device, as reports and ``run --json`` show them."""
        return {"node": self.node, "device": self.device}


@dataclass
class SubmittedTrial:
    """A trial that waits for a slot or has one, with its reports for Tune."""

    number: int
    record: TrialRecord
    worker: str | None = None
    copied: Copied | None = None  # the copy made since the last report, if any
    reports: asyncio.Queue[Report] = field(default_factory=asyncio.Queue)
    submitted: int = 1  # number of submissions; only the latest trainable gets reports
    released: bool = False
    undecided: Report | None = None  # the report that Tune has not decided on yet
    slot: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Wakes the caller that waits in ``next_report``, which clears it and checks what changed."""

    def become(self, copy: CopyDecision) -> None:
        """Go on as the copy of another trial, which the next report tells."""
        self.record.spec, self.record.checkpoint = copy.copied.spec, copy.checkpoint
        self.copied = copy.copied


@dataclass
class Worker:
    """The slots of a worker, and the trials in them.

    ``seated`` trials hold a slot. ``fresh`` trials are the seated trials that the worker has not
    been given yet. ``leaving`` trials have lost their slot, and the worker has not been told yet.
    """

    capacity: int
    seated: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    leaving: list[str] = field(default_factory=list)


class Broker:
    """The broker of a search; the module's docstring describes its protocol.

    ``total`` is the number of trials that the search will have. With a ``population``, trials copy
    each other. ``in_turn`` seats each replacement of an ended trial before the next report is
    handed out.
    """

    def __init__(
        self, total: int, in_turn: bool = False, population: Population | None = None
    ) -> None:
        self.total = total
        self.in_turn = in_turn
        self.population = population
        self.begun: Mapping[str, TrialRecord] = {}
        self.copies: Mapping[str, CopyDecision] = {}
        self.trials: dict[str, SubmittedTrial] = {}
        self.workers: dict[str, Worker] = {}
        self.lost: dict[str, ActorHandle | None] = {}
        self.places: dict[str, Place] = {}
        self.jobs: dict[int, EvaluationJob] = {}
        self.taken: dict[int, tuple[str, EvaluationJob]] = {}
        self.results: dict[int, dict[str, float]] = {}
        self._readings: dict[str, Reading] = {}
        self.finished = False
        self.failure: OrchestratorError | None = None
        self.base_model: BaseModelInfo | None = None  # of the backbone that a worker loaded
        self.patience = PATIENCE_S
        self.starting = False  # true once any worker's process runs
        self._numbers = itertools.count()
        self._changed = asyncio.Condition()

    # Trials

    async def submit(self, trial: str, number: int, spec: TrialSpec) -> None:
        """Register a trial that wants a slot.

        A trainable that was lost with its node and started anew submits its trial again. That
        changes nothing for the trial; a report that Tune never decided on is handed out once more.
        """
        if entry := self.trials.get(trial):
            entry.submitted += 1
            entry.news.set()
            if entry.undecided and entry.reports.empty():
                entry.reports.put_nowait(entry.undecided)
        else:
            record = self.begun.get(trial) or TrialRecord(trial, spec)
            self.trials[trial] = SubmittedTrial(number, record)
            if copy := self.copies.get(trial):
                self.trials[trial].become(copy)
        await self._notify()

    async def next_report(self, trial: str) -> Report | None:
        """Wait for the trial's next report; returns None if the trial was stopped.

        A call of a trainable that was replaced returns None too. Raises the failure of the search,
        or JobFailed, once the search can't go on.
        """
        entry = self.trials[trial]
        asker = entry.submitted
        # An event per trial: on a shared condition, each report would wake thousands of trials.
        while (
            entry.reports.empty()
            and not (entry.released or self._over)
            and entry.submitted == asker
        ):
            entry.news.clear()
            await entry.news.wait()
        if entry.submitted != asker:
            return None
        if not entry.reports.empty():
            return entry.reports.get_nowait()
        if entry.released:
            return None
        raise self._end()

    async def decide(self, trial: str, goes_on: bool) -> None:
        """Take Tune's decision on the newest report: continue the trial, or free its slot at once.

        ``goes_on`` is false also for a trial that Tune has lost.
        """
        if entry := self.trials.get(trial):
            entry.undecided = None
            entry.released = not goes_on
            entry.news.set()
        if (
            entry
            and entry.released
            and entry.worker
            and trial in (worker := self.workers[entry.worker]).seated
        ):
            worker.seated.remove(trial)
            worker.leaving.append(trial)
        await self._notify()

    async def end_trials(self) -> None:
        """Release every trial after Tune has ended, and wait for no further trials."""
        self.total = len(self.trials)
        for trial in self.trials:
            await self.decide(trial, False)

    # Workers

    async def start(self) -> None:
        """Note that a worker's process runs and begins to load what it needs."""
        self.starting = True
        await self._notify()

    async def started(self, patience: float) -> bool:
        """Wait up to ``patience`` seconds for a worker's process; returns whether there is one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: self.starting or self._over)
        return self.starting

    async def join(
        self,
        worker: str,
        capacity: int,
        info: BaseModelInfo | None = None,
        place: Place | None = None,
    ) -> None:
        """Register a worker with free slots.

        If the worker has joined before, its trials wait for a slot again, from their checkpoints.
        """
        self._vacate(worker)
        self.workers[worker] = Worker(capacity)
        self.lost.pop(worker, None)
        self.base_model = info
        if place is not None:
            self.places[worker] = place
        await self._notify()

    async def leave(self, worker: str, controller: ActorHandle | None = None) -> None:
        """Remove a lost worker, which may join again.

        Its trials wait for a slot on any worker, from their checkpoints. ``controller`` is the
        actor that tries to start the worker again; ``lost_controllers`` returns it.
        """
        self._vacate(worker)
        self.workers.pop(worker, None)
        self.lost[worker] = controller
        await self._notify()

    async def worker_places(self) -> dict[str, Place]:
        """Return the current or last place of each worker."""
        return dict(self.places)

    async def lost_controllers(self) -> dict[str, ActorHandle | None]:
        """Return the controllers of the workers that left and have not come back, by worker."""
        return dict(self.lost)

    def _vacate(self, worker: str) -> None:
        """Take a worker's trials out of their slots, and queue its evaluations again."""
        self._readings.pop(worker, None)
        for entry in self.trials.values():
            if entry.worker == worker:
                entry.worker = None
        for number in [number for number, (taker, _) in self.taken.items() if taker == worker]:
            self.jobs[number] = self.taken.pop(number)[1]

    async def next_orders(
        self,
        name: str,
        reports: Sequence[Report] = (),
        evaluated: Sequence[tuple[int, dict[str, float]]] = (),
    ) -> Orders:
        """Take the worker's reports and results, and return its next orders once there is work."""
        self._readings.pop(name, None)
        for number, metrics in evaluated:
            if self.taken.pop(number, None):
                self.results[number] = metrics
        await self._notify()
        worker = self.workers.get(name)
        if worker is None:
            return Orders(stop=True)  # declared lost: its trials have moved to other workers
        await self._take(name, worker, reports)
        while True:
            await self._trials_to_come(worker)
            if self._gone(name, worker):
                return Orders(stop=True)
            self._assign(name, worker)
            if self.jobs or worker.seated:
                return self._orders(name, worker)
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self.jobs or self._waiting() or self._gone(name, worker)
                )

    async def read(self, worker: str, reading: Reading) -> None:
        """Keep a worker's newest reading until its round or evaluation ends."""
        if worker in self.workers:
            self._readings[worker] = reading

    def _gone(self, name: str, worker: Worker) -> bool:
        """Check for a stale call: the worker was lost or has rejoined, or the search is over.

        Nobody receives the answer to a stale call, so trials that it seated would be lost.
        """
        return self._over or self.workers.get(name) is not worker

    async def _take(self, name: str, worker: Worker, reports: Sequence[Report]) -> None:
        """Deliver a round's reports one by one, then make the copies of the population."""
        reports = sorted(reports, key=lambda report: self.trials[report.trial].number)
        for place, report in enumerate(reports, start=1):
            if not self._gone(name, worker):
                await self._deliver(replace(report, pending=len(reports) - place), worker)
        if self.population and not self._gone(name, worker):
            specs = [(report, self.trials[report.trial].record.spec) for report in reports]
            for copy in self.population.copies(specs, list(worker.seated)):
                self._copy(copy, worker)

    def _orders(self, name: str, worker: Worker) -> Orders:
        """Order an evaluation if one is queued, since a caller waits for it; otherwise a round."""
        free, worker.leaving = tuple(worker.leaving), []
        if self.jobs:
            number = min(self.jobs)
            self.taken[number] = name, self.jobs.pop(number)
            return Orders(free, evaluate=((number, self.taken[number][1]),))
        fresh = [trial for trial in worker.seated if trial in worker.fresh]
        worker.fresh.clear()
        records = [self.trials[trial].record for trial in fresh]
        seats = [SeatOrder(record.id, record.spec, record.checkpoint) for record in records]
        return Orders(free, tuple(seats))

    async def _deliver(self, report: Report, worker: Worker) -> None:
        """Hand one report to Tune and wait for its decision."""
        entry = self.trials[report.trial]
        if entry.released:
            return
        report = self._kept(entry, report)
        if report.ending and entry.worker:
            seats = self.workers[entry.worker]
            seats.seated = [trial for trial in seats.seated if trial != report.trial]
        entry.reports.put_nowait(report)
        entry.news.set()
        entry.undecided = report
        await self._notify()
        await self._until(lambda: entry.undecided is None)
        if self.in_turn:
            await self._until(lambda: self._all_came(worker))

    def _kept(self, entry: SubmittedTrial, report: Report) -> Report:
        """Update the trial from its report, and add to the report what only the broker knows.

        The broker adds the worker, slot and place, the copy since the last report, and the own
        score.
        """
        own_score = entry.record.own_score
        if not (entry.record.copied or entry.copied):
            own_score = None if report.ending == "diverged" else report.score
        worker = entry.worker or ""
        place = self.places[worker].shown() if worker in self.places else {}
        report = replace(report, worker=worker, slot=entry.slot, place=place)
        report = replace(report, copied=entry.copied, own_score=own_score)
        entry.copied = None
        entry.record.add(report)
        return report

    def _copy(self, copy: CopyDecision, worker: Worker) -> None:
        """Turn a trial into a copy of another: the worker frees its slot and seats it again."""
        self.trials[copy.trial].become(copy)
        worker.leaving.append(copy.trial)
        worker.fresh.add(copy.trial)

    async def _trials_to_come(self, worker: Worker) -> None:
        """Wait while slots are free and Tune has trials to start, or until an evaluation comes."""
        await self._until(lambda: self._all_came(worker) or bool(self.jobs))

    def _all_came(self, worker: Worker) -> bool:
        """Check whether all trials were submitted, or enough of them to fill the worker's slots."""
        return (
            len(self.trials) >= self.total
            or len(worker.seated) + len(self._waiting()) >= worker.capacity
        )

    def _assign(self, name: str, worker: Worker) -> None:
        """Seat waiting trials in the worker's free slots."""
        for trial in self._waiting()[: worker.capacity - len(worker.seated)]:
            entry = self.trials[trial]
            taken = {self.trials[other].slot for other in worker.seated}
            entry.worker, entry.slot = (
                name,
                next(slot for slot in itertools.count() if slot not in taken),
            )
            worker.seated.append(trial)
            worker.fresh.add(trial)

    def _waiting(self) -> list[str]:
        """List the trials without a slot, in the order in which Tune made them."""
        waiting = [
            trial
            for trial, entry in self.trials.items()
            if entry.worker is None and not entry.released
        ]
        return sorted(waiting, key=lambda trial: self.trials[trial].number)

    # Driver

    async def expect(
        self,
        total: int,
        begun: Mapping[str, TrialRecord],
        population: Population | None,
        copies: Mapping[str, CopyDecision],
    ) -> None:
        """Prepare for trials: of a search, possibly resumed, or of its confirmation after it.

        ``total`` is the number of trials that are left, and ``begun`` holds those already under
        way. ``population`` knows the comparisons made so far, and ``copies`` are its decisions
        after the last reports.
        """
        self.total = len(self.trials) + total
        self.begun, self.copies = begun, copies
        self.population = population or self.population
        await self._notify()

    async def evaluation(self, job: EvaluationJob) -> dict[str, float]:
        """Queue an evaluation for the first free worker, and return its metrics."""
        number = next(self._numbers)
        self.jobs[number] = job
        await self._notify()
        async with self._changed:
            await self._changed.wait_for(lambda: number in self.results or self._over)
        if number not in self.results:
            raise self._end()
        return self.results.pop(number)

    async def readings(self) -> dict[str, Reading]:
        """Return how far each worker is within its round or evaluation."""
        return dict(self._readings)

    async def ready(self) -> BaseModelInfo | None:
        """Wait for the first worker, and return the description of the backbone that it loaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.workers or self._over)
        if self._over:
            raise self._end()
        return self.base_model

    async def finish(self) -> None:
        """End the search: workers stop at their next call, and all waiting callers return."""
        self.finished = True
        self._tell_trials()
        await self._notify()

    async def fail(self, failure: OrchestratorError) -> None:
        """End the search with a failure, which all waiting callers raise.

        The workers are gone for good, or the driver has given up. The first failure is kept.
        """
        self.failure = self.failure or failure
        self._tell_trials()
        await self._notify()

    @property
    def _over(self) -> bool:
        return self.finished or self.failure is not None

    def _end(self) -> OrchestratorError:
        """Make the error that callers get once the search is over."""
        return (
            type(self.failure)(*self.failure.args)
            if self.failure
            else JobFailed("the search has ended")
        )

    def _tell_trials(self) -> None:
        """Wake every caller that waits in ``next_report``."""
        for entry in self.trials.values():
            entry.news.set()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition``, at most ``patience`` seconds.

        Once a wait has run out, all later waits are limited to ``IMPATIENCE_S``.
        """

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: condition() or self._over)

        try:
            await asyncio.wait_for(wait(), self.patience)
        except TimeoutError:
            self.patience = IMPATIENCE_S


class BrokerHandle:
    """The broker's methods as other processes call them, with ``handle.METHOD.remote(...)``."""

    submit = ActorMethod(Broker.submit)
    next_report = ActorMethod(Broker.next_report)
    decide = ActorMethod(Broker.decide)
    end_trials = ActorMethod(Broker.end_trials)

    start = ActorMethod(Broker.start)
    join = ActorMethod(Broker.join)
    next_orders = ActorMethod(Broker.next_orders)
    read = ActorMethod(Broker.read)
    leave = ActorMethod(Broker.leave)

    started = ActorMethod(Broker.started)
    ready = ActorMethod(Broker.ready)
    expect = ActorMethod(Broker.expect)
    evaluation = ActorMethod(Broker.evaluation)
    readings = ActorMethod(Broker.readings)
    worker_places = ActorMethod(Broker.worker_places)
    lost_controllers = ActorMethod(Broker.lost_controllers)
    finish = ActorMethod(Broker.finish)
    fail = ActorMethod(Broker.fail)
