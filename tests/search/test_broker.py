"""The broker as a plain asyncio object, without Ray or a model; reports are made up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.trials import TrialRecord
from orchestrator.search.study.population import CopyDecision, Population
from orchestrator.search.workers import broker as broker_module
from orchestrator.search.workers.broker import Broker, Orders, Place
from orchestrator.tuning.meter import Reading
from orchestrator.tuning.reports import Copied, Ending, EvaluationJob, Report

LIMIT_S = 30.0  # reached only in a deadlock


def run(test: Coroutine[Any, Any, Any]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, LIMIT_S)

    asyncio.run(bounded())


def spec(number: int) -> TrialSpec:
    return TrialSpec("random", None, num_virtual_tokens=2, learning_rate=0.1, seed=number)


def name(number: int) -> str:
    return f"t{number}"


def report(number: int, step: int = 1, ending: Ending | None = None) -> Report:
    metrics = {"loss": 1.0}
    return Report(
        name(number), step, metrics, 1.0, step, metrics, 1.0, f"{number}@{step}".encode(), ending
    )


async def broker_with(trials: int, total: int | None = None) -> Broker:
    """Return a broker whose trials were submitted in reverse order of their numbers."""
    broker = Broker(trials if total is None else total)
    for number in reversed(range(trials)):
        await broker.submit(name(number), number, spec(number))
    return broker


def seated(orders: Orders) -> list[str]:
    return [seat.trial for seat in orders.seat]


async def let_run() -> None:
    """Let every other coroutine run until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


def tune(
    broker: Broker,
    numbers: range,
    goes_on: Callable[[Report], bool] = lambda _: True,
    log: list[str] | None = None,
) -> list[asyncio.Task[None]]:
    """Follow trials that wait for their reports and decide at once, as Tune does."""

    async def follow(number: int) -> None:
        while (got := await broker.next_report(name(number))) is not None:
            if log is not None:
                log.append(f"{got.trial}@{got.step}")
            stays = goes_on(got) and got.ending is None
            await broker.decide(name(number), stays)
            if not stays:
                return

    return [asyncio.ensure_future(follow(number)) for number in numbers]


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_slots_go_in_the_order_of_the_numbers() -> None:
    """The trial with the lowest number gets the first slot, whatever the order of submission."""

    async def test() -> None:
        broker = await broker_with(5)
        await broker.join("w", 3)
        orders = await broker.next_orders("w")
        assert seated(orders) == ["t0", "t1", "t2"]
        assert [seat.spec.seed for seat in orders.seat] == [0, 1, 2]
        assert all(seat.checkpoint is None for seat in orders.seat)

    run(test())


def test_a_round_waits_for_the_trials_that_are_to_come() -> None:
    """A round waits for trials that are still starting while slots are free.

    Otherwise a search would not be repeatable.
    """

    async def test() -> None:
        broker = await broker_with(1, total=2)
        await broker.join("w", 2)
        orders = asyncio.ensure_future(broker.next_orders("w"))
        await let_run()
        assert not orders.done()
        await broker.submit("t1", 1, spec(1))
        assert seated(await orders) == ["t0", "t1"]

    run(test())


def test_a_stopped_trials_slot_is_filled_in_the_very_next_orders() -> None:
    """The orders that free a slot also seat the next trial in it."""

    async def test() -> None:
        broker = await broker_with(3)
        await broker.join("w", 2)
        await broker.next_orders("w")
        tasks = tune(broker, range(3), goes_on=lambda got: got.trial != "t0")
        orders = await broker.next_orders("w", [report(0), report(1)])
        assert orders.free == ("t0",)
        assert seated(orders) == ["t2"]
        await ended(tasks)

    run(test())


def test_a_finished_trials_slot_is_filled_too_and_needs_no_freeing() -> None:
    """A trial that has ended by itself needs no order to free its slot."""

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("w", 1)
        await broker.next_orders("w")
        tasks = tune(broker, range(2))
        orders = await broker.next_orders("w", [report(0, 8, "steps")])
        assert orders.free == ()
        assert seated(orders) == ["t1"]
        await ended(tasks)

    run(test())


def test_reports_go_to_tune_one_at_a_time_in_trial_order() -> None:
    """The second report is handed out after the decision on the first, in the order of trials.

    The order in the worker's list does not matter.
    """

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("w", 2)
        await broker.next_orders("w")
        orders = asyncio.ensure_future(broker.next_orders("w", [report(1), report(0)]))
        second = asyncio.ensure_future(broker.next_report("t1"))
        assert (await broker.next_report("t0")).step == 1  # type: ignore[union-attr]
        await let_run()
        assert not second.done() and not orders.done()
        await broker.decide("t0", True)
        await second
        await let_run()
        assert not orders.done()
        await broker.decide("t1", True)
        await orders

    run(test())


def test_a_worker_that_joins_again_goes_on_from_the_newest_checkpoints() -> None:
    """A dead worker's trials are seated again from the checkpoints of their last reports."""

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("w", 2)
        await broker.next_orders("w")
        tasks = tune(broker, range(2))
        await broker.next_orders("w", [report(0, 1), report(1, 1)])
        await broker.next_orders("w", [report(0, 2)])
        await broker.join("w", 2)
        orders = await broker.next_orders("w")
        assert {seat.trial: seat.checkpoint for seat in orders.seat} == {"t0": b"0@2", "t1": b"1@1"}
        await ended(tasks)

    run(test())


def test_the_call_of_a_dead_worker_takes_no_trials() -> None:
    """A call for orders that a dead worker left behind seats no trial."""

    async def test() -> None:
        broker = Broker(1)
        await broker.join("w", 2)
        dead = asyncio.ensure_future(broker.next_orders("w"))
        await let_run()
        await broker.join("w", 2)
        await broker.submit("t0", 0, spec(0))
        assert (await dead).stop
        assert seated(await broker.next_orders("w")) == ["t0"]

    run(test())


def test_the_reports_of_a_dead_worker_are_not_handed_on_after_it_is_back() -> None:
    """Undecided reports of a dead worker are dropped; those steps are trained again."""

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("w", 2)
        await broker.next_orders("w")
        dead = asyncio.ensure_future(broker.next_orders("w", [report(0), report(1)]))
        await broker.next_report("t0")
        await broker.join("w", 2)
        await broker.decide("t0", True)
        assert (await dead).stop
        again = {seat.trial: seat.checkpoint for seat in (await broker.next_orders("w")).seat}
        assert again == {"t0": b"0@1", "t1": None}

    run(test())


def test_an_evaluation_goes_before_a_round() -> None:
    """Evaluation jobs are done before a round, one at a time; callers get their own metrics."""

    async def test() -> None:
        broker = await broker_with(1)
        await broker.join("w", 1)
        jobs = [EvaluationJob("validation"), EvaluationJob("test")]
        asked = [asyncio.ensure_future(broker.evaluation(job)) for job in jobs]
        await let_run()
        evaluated: list[tuple[int, dict[str, float]]] = []
        for job in jobs:
            orders = await broker.next_orders("w", evaluated=evaluated)
            assert [found for _, found in orders.evaluate] == [job] and not orders.seat
            evaluated = [(number, {"loss": float(number)}) for number, _ in orders.evaluate]
        assert seated(await broker.next_orders("w", evaluated=evaluated)) == ["t0"]
        assert [await task for task in asked] == [{"loss": 0.0}, {"loss": 1.0}]

    run(test())


def test_a_job_outlives_the_worker_that_had_it() -> None:
    """An evaluation is handed out again when its worker rejoins without the result."""

    async def test() -> None:
        broker = Broker(0)
        await broker.join("w", 1)
        asked = asyncio.ensure_future(broker.evaluation(EvaluationJob("test")))
        await let_run()
        await broker.next_orders("w")
        await broker.join("w", 1)
        ((number, job),) = (await broker.next_orders("w")).evaluate
        assert job == EvaluationJob("test")
        last = asyncio.ensure_future(broker.next_orders("w", evaluated=[(number, {"loss": 2.0})]))
        assert await asked == {"loss": 2.0}
        await broker.finish()
        assert (await last).stop

    run(test())


async def waiters(broker: Broker) -> list[asyncio.Task[Any]]:
    """Start a trial, a driver and a worker that wait for something that will not come."""
    await broker.join("w", 2)
    calls: list[Awaitable[Any]] = [
        broker.next_report("t0"),
        broker.evaluation(EvaluationJob("test")),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await let_run()
    broker.jobs.clear()  # as if a worker had taken the job and were still busy with it
    orders = asyncio.ensure_future(broker.next_orders("w"))
    await let_run()
    return [*tasks, orders]


def test_a_failure_wakes_everybody_with_its_reason() -> None:
    """A failure is raised in the waiting trial and driver; the worker is told to stop."""

    async def test() -> None:
        broker = await broker_with(1, total=2)
        *waiting, orders = await waiters(broker)
        await broker.fail(JobFailed("the worker burnt", "buy another"))
        await broker.fail(JobFailed("later news"))
        for task in waiting:
            with pytest.raises(JobFailed, match="the worker burnt") as failed:
                await task
            assert failed.value.hint == "buy another"
        assert (await orders).stop
        with pytest.raises(JobFailed, match="the worker burnt"):
            await broker.ready()

    run(test())


def test_the_end_wakes_everybody() -> None:
    """finish ends every wait."""

    async def test() -> None:
        broker = await broker_with(1, total=2)
        *waiting, orders = await waiters(broker)
        await broker.finish()
        assert (await orders).stop
        for task in waiting:
            with pytest.raises(JobFailed, match="ended"):
                await task

    run(test())


def test_a_trial_that_never_comes_costs_one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker waits its full patience once, then only briefly; the search goes on."""
    monkeypatch.setattr(broker_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(broker_module, "IMPATIENCE_S", 0.01)

    async def test() -> None:
        broker = await broker_with(1, total=3)
        await broker.join("w", 3)
        assert seated(await broker.next_orders("w")) == ["t0"]
        assert broker.patience == 0.01
        tasks = tune(broker, range(1))
        orders = await broker.next_orders("w", [report(0)])
        assert not orders.stop and not orders.free
        await ended(tasks)

    run(test())


def test_a_decision_that_never_comes_costs_one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial whose relay was lost does not hold up the others for good."""
    monkeypatch.setattr(broker_module, "PATIENCE_S", 0.2)

    async def test() -> None:
        broker = await broker_with(1)
        await broker.join("w", 1)
        await broker.next_orders("w")
        assert not (await broker.next_orders("w", [report(0)])).stop
        assert broker.patience == broker_module.IMPATIENCE_S

    run(test())


def test_submitting_twice_is_safe() -> None:
    """A trial that is submitted again keeps its slot, its checkpoint and its place in the order."""

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("w", 2)
        await broker.next_orders("w")
        tasks = tune(broker, range(2))
        await broker.next_orders("w", [report(0), report(1)])
        await broker.submit("t0", 0, spec(0))
        tasks += tune(broker, range(1))
        assert not (await broker.next_orders("w", [report(0, 2), report(1, 2)])).seat
        assert broker.trials["t0"].record.checkpoint == b"0@2"
        await ended(tasks)

    run(test())


def test_a_report_that_died_with_its_trainable_comes_again() -> None:
    """A report whose relay died before deciding goes to the relay's successor, and to no other."""

    async def test() -> None:
        broker = await broker_with(1)
        await broker.join("w", 1)
        await broker.next_orders("w")
        orders = asyncio.ensure_future(broker.next_orders("w", [report(0)]))
        assert (await broker.next_report("t0")) is not None
        await broker.submit("t0", 0, spec(0))
        again = await broker.next_report("t0")
        assert again is not None and again.step == 1
        await broker.decide("t0", True)
        assert not (await orders).seat
        stale = asyncio.ensure_future(broker.next_report("t0"))
        await let_run()
        await broker.submit("t0", 0, spec(0))
        assert await stale is None
        tasks = tune(broker, range(1))
        await broker.next_orders("w", [report(0, 2)])
        assert broker.trials["t0"].undecided is None
        await ended(tasks)

    run(test())


def test_trials_of_a_lost_worker_go_on_in_another() -> None:
    """A lost worker's trials are seated elsewhere, from their checkpoints.

    Its evaluation is done elsewhere too, and the lost worker is told to stop if it calls again.
    """

    async def test() -> None:
        broker = await broker_with(2)
        await broker.join("lost", 1)
        await broker.next_orders("lost")
        tasks = tune(broker, range(2))
        await broker.next_orders("lost", [report(0)])
        job = asyncio.ensure_future(broker.evaluation(EvaluationJob("test")))
        await let_run()
        assert (await broker.next_orders("lost", [report(0, 2)])).evaluate
        await broker.leave("lost", "whoever starts it")
        assert await broker.lost_controllers() == {"lost": "whoever starts it"}
        assert (await broker.next_orders("lost", [report(0, 3)])).stop
        await broker.join("other", 2)
        ((number, _),) = (await broker.next_orders("other")).evaluate
        seats = (await broker.next_orders("other", [], [(number, {"loss": 1.0})])).seat
        assert {seat.trial: seat.checkpoint for seat in seats} == {"t0": b"0@2", "t1": None}
        assert await job == {"loss": 1.0}
        await broker.join("lost", 1)
        assert await broker.lost_controllers() == {}
        await ended(tasks)

    run(test())


def test_a_report_says_where_it_comes_from() -> None:
    """A report has its worker, its slot and the place that the worker gave when it joined."""

    async def test() -> None:
        found: list[Report] = []
        broker = await broker_with(2)
        await broker.join("w", 2, place=Place("node", None, "cuda"))
        await broker.next_orders("w")
        tasks = tune(broker, range(2), lambda report: found.append(report) is None)
        await broker.next_orders("w", [report(0), report(1)])
        assert [(it.worker, it.slot) for it in found] == [("w", 0), ("w", 1)]
        assert [it.place for it in found] == 2 * [{"node": "node", "device": "cuda"}]
        await ended(tasks)

    run(test())


def test_a_late_report_of_a_stopped_trial_is_dropped() -> None:
    """A report that crossed with the decision to stop its trial changes nothing."""

    async def test() -> None:
        broker = await broker_with(1)
        await broker.join("w", 1)
        await broker.next_orders("w")
        await broker.decide("t0", False)
        last = asyncio.ensure_future(broker.next_orders("w", [report(0)]))
        assert await broker.next_report("t0") is None
        await broker.finish()
        await last
        assert broker.trials["t0"].record.checkpoint is None

    run(test())


def test_the_end_of_the_study_frees_whoever_still_sits() -> None:
    """When Tune ends early, trials waiting for reports are released.

    The broker no longer waits for trials to be submitted.
    """

    async def test() -> None:
        broker = await broker_with(2, total=9)
        broker.patience = LIMIT_S * 2
        await broker.join("w", 4)
        waiting = asyncio.ensure_future(broker.next_report("t0"))
        orders = asyncio.ensure_future(broker.next_orders("w"))
        await let_run()
        await broker.end_trials()
        assert await waiting is None
        asked = asyncio.ensure_future(broker.evaluation(EvaluationJob("test")))
        assert (await orders).evaluate
        await broker.finish()
        with pytest.raises(JobFailed):
            await asked

    run(test())


def population() -> Population:
    """Return a Population that compares at every step; learning rates are between 0.01 and 1."""
    return Population(
        JobSpec.model_validate(
            {
                "name": "population",
                "base_model": {"id": "none"},
                "data": {"path": "none", "template": "{text}", "target": "label"},
                "search": {
                    "space": {
                        "init": "random",
                        "num_virtual_tokens": 2,
                        "learning_rate": [0.01, 1.0],
                    },
                    "scheduler": "pbt",
                    "metric": "loss",
                },
                "train": {"steps": 9, "evaluate_every": 1},
            }
        )
    )


def scored(number: int, score: float, step: int = 1) -> Report:
    return replace(report(number, step), score=score, best_metrics={"loss": score})


def test_a_bad_trial_is_seated_anew_as_a_good_one() -> None:
    """A bad trial gets another's checkpoint and its own new configuration.

    Only its next report names the copy.
    """

    async def test() -> None:
        broker = await broker_with(2)
        broker.population = population()
        await broker.join("w", 2)
        await broker.next_orders("w")
        heard: list[Report] = []
        tasks = tune(broker, range(2), goes_on=lambda got: not heard.append(got))  # type: ignore[func-returns-value]
        orders = await broker.next_orders("w", [scored(0, 0.5), scored(1, 0.1)])
        assert orders.free == ("t0",)
        (seat,) = orders.seat
        assert (seat.trial, seat.checkpoint) == ("t0", b"1@1")
        assert seat.spec.seed == 0 and seat.spec.learning_rate in (0.1 * 0.8, 0.1 * 1.2)
        for step in (2, 3):
            await broker.next_orders("w", [scored(0, 0.1, step), scored(1, 0.1, step)])
        copied = Copied("t1", 1, seat.spec)
        assert [one.copied for one in heard if one.trial == "t0"] == [None, copied, None]
        assert [one.copied for one in heard if one.trial == "t1"] == [None, None, None]
        await ended(tasks)

    run(test())


def test_a_copy_outlives_its_worker() -> None:
    """A copy whose worker died before training it is seated again as the copy."""

    async def test() -> None:
        broker = await broker_with(2)
        broker.population = population()
        await broker.join("w", 2)
        await broker.next_orders("w")
        tasks = tune(broker, range(2))
        await broker.next_orders("w", [scored(0, 0.5), scored(1, 0.1)])
        await broker.join("w", 2)
        orders = await broker.next_orders("w")
        assert {seat.trial: seat.checkpoint for seat in orders.seat} == {"t0": b"1@1", "t1": b"1@1"}
        assert orders.seat[0].spec.learning_rate != 0.1
        await ended(tasks)

    run(test())


def test_a_resumed_trial_goes_on_from_its_record() -> None:
    """A trial under way is seated from its record, or as the copy that was decided on.

    A copy keeps the own score that it had before, and only its next report names the copy.
    """

    async def test() -> None:
        broker = Broker(2)
        records = {name(number): TrialRecord(name(number), spec(number)) for number in range(2)}
        for number, record in enumerate(records.values()):
            record.add(replace(scored(number, 0.5), own_score=0.5))
        copied = Copied("t1", 1, spec(7))
        await broker.expect(2, records, None, {"t0": CopyDecision("t0", copied, b"1@1")})
        for number in range(2):
            await broker.submit(name(number), number, spec(9))
        await broker.join("w", 2)
        orders = await broker.next_orders("w")
        assert [(seat.trial, seat.spec, seat.checkpoint) for seat in orders.seat] == [
            ("t0", spec(7), b"1@1"),
            ("t1", spec(1), b"1@1"),
        ]
        heard: list[Report] = []
        tasks = tune(broker, range(2), goes_on=lambda got: not heard.append(got))  # type: ignore[func-returns-value]
        for step in (2, 3):
            await broker.next_orders("w", [scored(0, 0.9, step), scored(1, 0.9, step)])
        assert [(one.trial, one.copied, one.own_score) for one in heard] == [
            ("t0", copied, 0.5),
            ("t1", None, 0.9),
            ("t0", None, 0.5),
            ("t1", None, 0.9),
        ]
        await ended(tasks)

    run(test())


def test_a_trial_that_tune_stopped_copies_nothing() -> None:
    """A trial that Tune stopped copies nothing: its slot goes to the next trial."""

    async def test() -> None:
        broker = await broker_with(3)
        broker.population = population()
        await broker.join("w", 2)
        await broker.next_orders("w")
        tasks = tune(broker, range(3), goes_on=lambda got: got.trial != "t0")
        orders = await broker.next_orders("w", [scored(0, 0.5), scored(1, 0.1)])
        assert (
            orders.free == ("t0",)
            and seated(orders) == ["t2"]
            and orders.seat[0].checkpoint is None
        )
        await ended(tasks)

    run(test())


@pytest.mark.parametrize("in_turn", [True, False])
def test_trials_that_are_proposed_come_between_two_reports(in_turn: bool) -> None:
    """A proposed trial takes an ended one's slot before Tune gets the next report.

    The broker waits for the proposal. It does not wait where trials are known beforehand.
    """

    async def test() -> None:
        broker = await broker_with(2, total=4)
        broker.in_turn = in_turn
        await broker.join("w", 2)
        await broker.next_orders("w")
        log: list[str] = []
        tasks = tune(broker, range(2), log=log)
        orders = asyncio.ensure_future(
            broker.next_orders("w", [report(0, 8, "steps"), report(1, 8, "steps")])
        )
        await let_run()
        assert log == (["t0@8"] if in_turn else ["t0@8", "t1@8"])
        await broker.submit("t2", 2, spec(2))
        await let_run()
        assert log == ["t0@8", "t1@8"] and not orders.done()
        await broker.submit("t3", 3, spec(3))
        assert seated(await orders) == ["t2", "t3"]
        await ended(tasks)

    run(test())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_the_trials_and_lose_none(workers: int) -> None:
    """One worker at a time trains each trial to its end; Tune gets each step in order."""
    total, steps = 11, 3
    log: list[str] = []

    async def work(broker: Broker, worker: str) -> None:
        await broker.join(worker, 2)
        at: dict[str, int] = {}
        reports: list[Report] = []
        while not (orders := await broker.next_orders(worker, reports)).stop:
            for seat in orders.seat:
                at[seat.trial] = (
                    int(seat.checkpoint.decode().split("@")[1]) if seat.checkpoint else 0
                )
            reports = []
            for trial in list(at):
                at[trial] += 1
                over = at[trial] == steps
                reports.append(report(int(trial[1:]), at[trial], "steps" if over else None))
                if over:
                    del at[trial]
            await asyncio.sleep(0)

    async def test() -> None:
        broker = await broker_with(total)
        tasks = tune(broker, range(total), log=log)
        working = [asyncio.ensure_future(work(broker, f"w{number}")) for number in range(workers)]
        await asyncio.gather(*tasks)
        await broker.finish()
        await asyncio.gather(*working)

    run(test())
    for number in range(total):
        assert [line for line in log if line.startswith(f"t{number}@")] == [
            f"t{number}@{s}" for s in (1, 2, 3)
        ]


def test_trials_wait_for_a_workers_process() -> None:
    """Trials wait for the worker to start, up to their limit or until the search has failed."""

    async def test() -> None:
        broker = Broker(1)
        assert not await broker.started(0.01)
        waiting = asyncio.create_task(broker.started(LIMIT_S))
        await let_run()
        assert not waiting.done()
        await broker.start()
        assert await waiting and await broker.started(0)
        lost = Broker(1)
        waiting = asyncio.create_task(lost.started(LIMIT_S))
        await let_run()
        await lost.fail(JobFailed("no worker came"))
        assert not await waiting

    run(test())


def test_a_reading_lasts_as_long_as_its_round() -> None:
    """The driver gets each worker's newest reading, until the worker reports or is lost."""

    async def test() -> None:
        broker = await broker_with(2)
        reading = Reading("training", 1, 2, 1.0, 1.0)
        for worker in ("w0", "w1"):
            await broker.join(worker, 1)
            await broker.next_orders(worker)
            await broker.read(worker, reading)
        await broker.read("w0", replace(reading, done=2))
        assert await broker.readings() == {"w0": replace(reading, done=2), "w1": reading}
        await broker.leave("w1")
        await broker.read("w1", reading)  # sent before the worker was lost
        assert list(await broker.readings()) == ["w0"]
        await broker.join("w0", 1)
        assert await broker.readings() == {}

    run(test())
