"""The broker: hands trials to worker slots, carries reports back, and keeps every trial's newest checkpoint.

One asyncio object (an actor in a cluster, a plain object in tests). Three kinds of callers:

* trials (Ray Tune trainables) ``submit`` themselves and then wait in ``next_report``;
* workers (Ray Train) ``join`` and then loop in ``next_orders``, bringing their reports along;
* the driver passes on what Tune ``decide``d of each report, asks for an ``evaluation``, and says ``finish``.

A search repeats exactly on one worker because the broker lets nothing race: after a round it hands out the reports one
by one, in the order of the trials, waits each time for Tune's decision, then waits for the trials that Tune starts in
the freed slots. Only then the next round begins. Where trials are proposed from the results of others (``in_turn``), it
waits for each trial that takes the place of an ended one before it hands out the next report. The waits are
milliseconds and have a limit, so that a trial that never comes costs time once, and the repeatability, but never the
search.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.errors import JobFailed, OrchestratorError
from orchestrator.job.space import TrialSpec
from orchestrator.search.study.population import Copy, Population
from orchestrator.tuning.reports import Begun, Copied, EvaluationJob, Report

PATIENCE_S = 60.0  # the longest wait for a decision or for a trial to start
IMPATIENCE_S = 0.5  # the same, once a wait has run out


@dataclass(frozen=True)
class Seat:
    """A trial for a worker's slot, from its newest checkpoint if it has one."""

    trial: str
    spec: TrialSpec
    checkpoint: bytes | None


@dataclass(frozen=True)
class Orders:
    """What a worker does next: free and fill slots, evaluate, train a round; or stop."""

    free: tuple[str, ...] = ()
    seat: tuple[Seat, ...] = ()
    evaluate: tuple[tuple[int, EvaluationJob], ...] = ()
    stop: bool = False


@dataclass(frozen=True)
class Place:
    """Where a worker is: the node's id, Ray's placement group, and the kind of device that it trains on."""

    node: str
    placement_group: Any
    device: str = "cpu"

    def shown(self) -> dict[str, str]:
        return {"node": self.node, "device": self.device}


@dataclass
class Entry:
    """A trial as the broker knows it."""

    number: int
    spec: TrialSpec
    worker: str | None = None
    checkpoint: bytes | None = None
    copied: Copied | None = None  # since the last report
    own_score: float | None = None
    has_copied: bool = False
    reports: asyncio.Queue[Report] = field(default_factory=asyncio.Queue)
    submitted: int = 1  # how often; only the trainable that came last gets reports
    released: bool = False
    undecided: Report | None = None  # is with Tune, which has not yet said whether to go on
    slot: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """For whoever waits in ``next_report``; a waiter clears it, and looks for what came."""


@dataclass
class Worker:
    """A worker's slots: who sits, who sits but is not yet known to the worker, who has to leave."""

    capacity: int
    seated: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    leaving: list[str] = field(default_factory=list)


class Broker:
    """See the module's text. ``total`` is the number of trials that the search will have; with a ``population``, trials
    copy each other."""

    def __init__(
        self, total: int, in_turn: bool = False, population: Population | None = None
    ) -> None:
        self.total = total
        self.in_turn = in_turn
        self.population = population
        self.begun: dict[str, Begun] = {}
        self.trials: dict[str, Entry] = {}
        self.workers: dict[str, Worker] = {}
        self.lost: dict[str, Any] = {}
        self.places: dict[str, Place] = {}
        self.jobs: dict[int, EvaluationJob] = {}
        self.taken: dict[int, tuple[str, EvaluationJob]] = {}
        self.results: dict[int, dict[str, float]] = {}
        self.finished = False
        self.failure: OrchestratorError | None = None
        self.base_model: Any = None  # what the first worker found its backbone to be
        self.patience = PATIENCE_S
        self.starting = False  # whether some worker's process is there
        self._numbers = itertools.count()
        self._changed = asyncio.Condition()

    # Trials

    async def submit(self, trial: str, number: int, config: dict[str, Any]) -> None:
        """A trial that wants a slot.

        Submitting again (a trainable that was lost with its node and started anew) changes nothing for the trial; the
        report that Tune never answered is handed out once more.
        """
        if entry := self.trials.get(trial):
            entry.submitted += 1
            entry.news.set()
            if entry.undecided and entry.reports.empty():
                entry.reports.put_nowait(entry.undecided)
        else:
            begun = self.begun.get(trial) or Begun(TrialSpec.from_config(config))
            self.trials[trial] = Entry(
                number,
                begun.spec,
                None,
                begun.checkpoint,
                begun.copied,
                begun.own_score,
                begun.has_copied,
            )
        await self._notify()

    async def next_report(self, trial: str) -> Report | None:
        """The trial's next evaluation, None when it was stopped. Raises JobFailed once the search can't go on."""
        entry = self.trials[trial]
        asker = entry.submitted
        # Not the condition that all share: thousands of trials would wake for every report of another.
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
        """Tune has seen the newest report (or lost the trial): the trial goes on, or its slot is free at once."""
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
        """Tune has ended: who still sits leaves, and nobody is waited for any more."""
        self.total = len(self.trials)
        for trial in self.trials:
            await self.decide(trial, False)

    # Workers

    async def start(self) -> None:
        """A worker's process is there, and begins to load what it needs."""
        self.starting = True
        await self._notify()

    async def started(self, patience: float) -> bool:
        """Wait until a worker's process is there, but not for more than so many seconds; whether it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: self.starting or self._over)
        return self.starting

    async def join(
        self, worker: str, capacity: int, info: Any = None, place: Place | None = None
    ) -> None:
        """A worker with free slots. If it was here before, its trials wait again, from their checkpoints."""
        self._vacate(worker)
        self.workers[worker] = Worker(capacity)
        self.lost.pop(worker, None)
        self.base_model = info
        if place is not None:
            self.places[worker] = place
        await self._notify()

    async def leave(self, worker: str, controller: Any = None) -> None:
        """A worker was lost. Its trials wait for a slot anywhere, from their checkpoints; it may join again.

        ``controller`` is whoever tries to start it again; ``lost_controllers`` tells.
        """
        self._vacate(worker)
        self.workers.pop(worker, None)
        self.lost[worker] = controller
        await self._notify()

    async def worker_places(self) -> dict[str, Place]:
        """Where each worker is, or was last."""
        return dict(self.places)

    async def lost_controllers(self) -> dict[str, Any]:
        """Workers that left and have not come back, and who tries to start them again."""
        return dict(self.lost)

    def _vacate(self, worker: str) -> None:
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
        """Take the worker's reports and results; answer with its next orders once there is something to do."""
        for number, metrics in evaluated:
            if self.taken.pop(number, None):
                self.results[number] = metrics
        await self._notify()
        worker = self.workers.get(name)
        if worker is None:
            return Orders(stop=True)  # it was taken for lost, and its trials sit elsewhere
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

    def _gone(self, name: str, worker: Worker) -> bool:
        """Who was lost or joined again has died in between: nobody hears the answer to its call, and seats would be
        lost. So it is once the search is over."""
        return self._over or self.workers.get(name) is not worker

    async def _take(self, name: str, worker: Worker, reports: Sequence[Report]) -> None:
        """A round's reports, one after another, and what a population makes of them."""
        reports = sorted(reports, key=lambda report: self.trials[report.trial].number)
        for place, report in enumerate(reports, start=1):
            if not self._gone(name, worker):
                await self._deliver(replace(report, pending=len(reports) - place), worker)
        if self.population and not self._gone(name, worker):
            specs = [(report, self.trials[report.trial].spec) for report in reports]
            for copy in self.population.copies(specs, list(worker.seated)):
                self._copy(copy, worker)

    def _orders(self, name: str, worker: Worker) -> Orders:
        """An evaluation if one is asked for, since somebody waits for it; else a round."""
        free, worker.leaving = tuple(worker.leaving), []
        if self.jobs:
            number = min(self.jobs)
            self.taken[number] = name, self.jobs.pop(number)
            return Orders(free, evaluate=((number, self.taken[number][1]),))
        fresh = [trial for trial in worker.seated if trial in worker.fresh]
        worker.fresh.clear()
        seats = (
            Seat(trial, self.trials[trial].spec, self.trials[trial].checkpoint) for trial in fresh
        )
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

    def _kept(self, entry: Entry, report: Report) -> Report:
        """Keep what the report says of its trial, and add what only the broker knows."""
        entry.has_copied = entry.has_copied or entry.copied is not None
        if not entry.has_copied:
            entry.own_score = None if report.ending == "diverged" else report.score
        worker = entry.worker or ""
        place = self.places[worker].shown() if worker in self.places else {}
        report = replace(report, worker=worker, slot=entry.slot, place=place)
        report = replace(report, copied=entry.copied, own_score=entry.own_score)
        entry.copied = None
        entry.checkpoint = report.checkpoint
        return report

    def _copy(self, copy: Copy, worker: Worker) -> None:
        """Seat a trial anew, as another was: the worker hears that it leaves and that it comes."""
        entry = self.trials[copy.trial]
        entry.spec, entry.checkpoint, entry.copied = copy.copied.spec, copy.checkpoint, copy.copied
        worker.leaving.append(copy.trial)
        worker.fresh.add(copy.trial)

    async def _trials_to_come(self, worker: Worker) -> None:
        """Wait while slots are free and Tune still has trials that it has not started."""
        await self._until(lambda: self._all_came(worker) or bool(self.jobs))

    def _all_came(self, worker: Worker) -> bool:
        return (
            len(self.trials) >= self.total
            or len(worker.seated) + len(self._waiting()) >= worker.capacity
        )

    def _assign(self, name: str, worker: Worker) -> None:
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
        """Trials without a slot, first come first served in the order in which Tune made them."""
        waiting = [
            trial
            for trial, entry in self.trials.items()
            if entry.worker is None and not entry.released
        ]
        return sorted(waiting, key=lambda trial: self.trials[trial].number)

    # Driver

    async def expect(
        self, total: int, begun: dict[str, Begun], population: Population | None = None
    ) -> None:
        """A search that goes on: so many trials are left, some of them under way; what the population knows."""
        self.total = total
        self.begun = begun
        self.population = population or self.population
        await self._notify()

    async def evaluation(self, job: EvaluationJob) -> dict[str, float]:
        """Metrics of a job, done by whichever worker comes first."""
        number = next(self._numbers)
        self.jobs[number] = job
        await self._notify()
        async with self._changed:
            await self._changed.wait_for(lambda: number in self.results or self._over)
        if number not in self.results:
            raise self._end()
        return self.results.pop(number)

    async def ready(self) -> Any:
        """Wait for the first worker; answers with what it found its backbone to be."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.workers or self._over)
        if self._over:
            raise self._end()
        return self.base_model

    async def finish(self) -> None:
        """No more work: workers stop at their next call, and whoever waits is told."""
        self.finished = True
        self._tell_trials()
        await self._notify()

    async def fail(self, failure: OrchestratorError) -> None:
        """The workers are gone for good, or the driver gives up: whoever waits gets the reason, the first there was."""
        self.failure = self.failure or failure
        self._tell_trials()
        await self._notify()

    @property
    def _over(self) -> bool:
        return self.finished or self.failure is not None

    def _end(self) -> OrchestratorError:
        return (
            type(self.failure)(*self.failure.args)
            if self.failure
            else JobFailed("the search has ended")
        )

    def _tell_trials(self) -> None:
        for entry in self.trials.values():
            entry.news.set()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Any) -> None:
        """Wait for ``condition``, at most ``patience`` seconds; after one wait that ran out, be quick for good."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: condition() or self._over)

        try:
            await asyncio.wait_for(wait(), self.patience)
        except TimeoutError:
            self.patience = IMPATIENCE_S
