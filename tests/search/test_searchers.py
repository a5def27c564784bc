"""Properties of every searcher with every scheduler, on real Tune with the real broker.

Models are replaced by curves with a known optimum. A trial's curve climbs towards its quality,
which is 1 for one init at a learning rate of 0.1 and lower everywhere else.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import ray
from ray_state import eventually, holders

from orchestrator.cluster.ray_internals.settings import quiet_search_loggers
from orchestrator.job.space import TrialSpec, draw, grid, trial_count, trials
from orchestrator.job.spec import JobSpec, Scheduler, Searcher
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import Outcome, TrialRecord, TrialStatus, trial_id
from orchestrator.search.study.study import Concurrency, run_study
from orchestrator.search.workers.running import start_broker
from orchestrator.search.workers.worker import serve_orders
from orchestrator.tuning.reports import Report
from orchestrator.tuning.worker_group import Group

SEARCHERS: tuple[Searcher, ...] = get_args(Searcher)
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
COMBINATIONS = [(searcher, scheduler) for searcher in SEARCHERS for scheduler in SCHEDULERS]
STEPS, EVERY, TRIALS, SLOTS = 16, 4, 12, 2
PACE = 0.1  # the share of the remaining way to its quality that a curve climbs in a step
BEST_RATE = 0.1
RANGE = {"loguniform": [0.001, 10.0]}
LISTED = [0.001, BEST_RATE, 1.0, 10.0]


def job(searcher: str, scheduler: str, seed: int = 1) -> JobSpec:
    space = {
        "init": ["random", {"text": "good"}, {"text": "bad"}],
        "num_virtual_tokens": 5,
        "learning_rate": LISTED if searcher == "grid" else RANGE,
    }
    search: dict[str, Any] = {
        "space": space,
        "searcher": searcher,
        "scheduler": scheduler,
        "seed": seed,
    }
    if scheduler == "asha":
        search |= {"grace_steps": EVERY, "reduction_factor": 2}
    return JobSpec.model_validate(
        {
            "name": "curves",
            "base_model": {"id": "none"},
            "data": {
                "path": "none",
                "template": "{text}",
                "target": "label",
                "verbalizer": {0: "no", 1: "yes"},
            },
            "search": {**search, "trials": TRIALS},
            "train": {"steps": STEPS, "evaluate_every": EVERY},
        }
    )


def quality(spec: TrialSpec) -> float:
    """Return the limit of a trial's curve after endless training: 1 at the optimum."""
    inits = {"good": 1.0, "bad": 0.6, None: 0.8}
    return inits[spec.init_text] / (1.0 + abs(math.log10(spec.learning_rate / BEST_RATE)))


def reached(spec: TrialSpec, steps: int = STEPS) -> float:
    return quality(spec) * (1.0 - (1.0 - PACE) ** steps)


@dataclass
class Curve:
    """A trial as the substitute engine below holds it."""

    spec: TrialSpec
    step: int = 0
    value: float = 0.0
    best: float = 0.0
    best_step: int = 0

    def checkpoint(self) -> bytes:
        return json.dumps([self.step, self.value, self.best, self.best_step]).encode()


@dataclass
class Curves:
    """Substitute for the engine: the same methods, with a curve in place of a model."""

    capacity: int = SLOTS
    slots: dict[str, Curve] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)  # steps by trial
    group: Group = field(default_factory=Group)  # a group of one worker

    def seat(self, trial: str, spec: TrialSpec, checkpoint: bytes | None) -> None:
        assert trial not in self.slots and len(self.slots) < self.capacity
        self.slots[trial] = Curve(spec, *(json.loads(checkpoint) if checkpoint else ()))

    def free(self, trial: str) -> None:
        self.slots.pop(trial, None)

    def round(self) -> list[Report]:
        return [self._report(trial, curve) for trial, curve in list(self.slots.items())]

    def _report(self, trial: str, curve: Curve) -> Report:
        for _ in range(EVERY):
            curve.value += PACE * (quality(curve.spec) - curve.value)
        curve.step += EVERY
        self.trained[trial] += EVERY
        if curve.value > curve.best:
            curve.best, curve.best_step = curve.value, curve.step
        now, best = (
            {"accuracy": value, "loss": 1.0 - value} for value in (curve.value, curve.best)
        )
        ending = "steps" if curve.step == STEPS else None
        if ending:
            self.free(trial)
        return Report(
            trial,
            curve.step,
            now,
            1.0 - curve.value,
            curve.best_step,
            best,
            curve.best,
            curve.checkpoint(),
            ending,
        )  # type: ignore[arg-type]


@dataclass
class Heard:
    """A listener that keeps everything in order."""

    started: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def trial_started(self, trial: str, spec: TrialSpec) -> None:
        self.started.append(trial)

    def trial_reported(self, trial: str, report: Report) -> None:
        self.reports.append(report)

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None:
        self.ended.append(trial)


@dataclass(frozen=True)
class Study:
    """The results of one finished search."""

    job: JobSpec
    records: dict[str, TrialRecord]
    best: TrialRecord
    heard: Heard
    trained: Counter[str]
    left_behind: set[str]


def search(job: JobSpec) -> Study:
    """Run the job's search with one worker of curves, in the session's Ray."""
    quiet_search_loggers()
    before = holders()
    broker, curves, heard, known = start_broker(job), Curves(), Heard(), trials(job.search)
    outcome = Outcome([(trial_id(number), spec) for number, spec in enumerate(known)])
    ray.get(broker.join.remote("w", curves.capacity))
    worker = Thread(target=serve_orders, args=(curves, SimpleNamespace(name="w", broker=broker)))
    worker.start()
    try:
        with TemporaryDirectory() as storage:
            run_study(
                job, known, broker, Concurrency(SLOTS), Path(storage), [outcome, heard], History()
            )
    finally:
        broker.finish.remote()
        worker.join()
        ray.kill(broker)
    eventually(lambda: holders() <= before)
    left = holders() - before
    return Study(job, outcome.records, outcome.ranking(job.search)[0], heard, curves.trained, left)


@cache
def study(searcher: str, scheduler: str) -> Study:
    return search(job(searcher, scheduler))


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def done(request: pytest.FixtureRequest, ray_cluster: None) -> Study:
    return study(*request.param)


def test_the_same_seed_gives_the_same_search(done: Study) -> None:
    """A second run has the same trials, the same reports in the same order and the same endings."""
    again = search(done.job)
    assert (again.heard.reports, again.heard.ended) == (done.heard.reports, done.heard.ended)
    assert again.records == done.records


def test_the_best_trial_is_near_the_optimum(done: Study) -> None:
    """At most a tenth of the space's points end better; after a full grid, none does."""
    ends = sorted(reached(spec) for spec in draw(done.job.search.space, 1000, seed=99))
    assert done.best.metrics["accuracy"] >= ends[int(0.9 * len(ends))]
    if done.job.search.searcher == "grid" and done.job.search.scheduler == "fifo":
        assert done.best.metrics["accuracy"] == pytest.approx(max(ends))


def test_every_trial_ends_exactly_once(done: Study) -> None:
    """Each trial of the search starts once and ends once, finished or stopped."""
    names = [trial_id(number) for number in range(TRIALS)]
    assert sorted(done.heard.started) == sorted(done.heard.ended) == list(done.records) == names
    assert {record.status for record in done.records.values()} <= {"finished", "stopped"}
    assert all(
        (record.status == "finished") == (record.step == STEPS) for record in done.records.values()
    )


def test_the_budget_is_kept(done: Study) -> None:
    """A search has the trials it was given, all different; workers train no unreported steps."""
    assert len(done.records) == trial_count(done.job.search) == TRIALS
    assert done.trained == {name: record.step for name, record in done.records.items()}
    assert max(done.trained.values()) == STEPS
    assert [report.step for report in done.heard.reports if report.trial == done.best.id][
        -1
    ] == STEPS
    if done.job.search.scheduler != "pbt":
        assert len({record.spec for record in done.records.values()}) == TRIALS


def test_a_grid_is_covered(done: Study) -> None:
    """A grid's trials are its points, each once; other searchers stay within the ranges."""
    copied = {name for name, record in done.records.items() if record.copied}
    specs = {name: record.spec for name, record in done.records.items() if name not in copied}
    if done.job.search.searcher == "grid":
        points = {trial_id(number): spec for number, spec in enumerate(grid(done.job.search.space))}
        assert specs == {name: spec for name, spec in points.items() if name not in copied}
    else:
        assert all(0.001 <= spec.learning_rate <= 10.0 for spec in specs.values())
        assert len({spec.learning_rate for spec in specs.values()}) == len(specs)


def test_nothing_stays_in_ray(done: Study) -> None:
    """A finished search leaves no actor and no placement group."""
    assert done.left_behind == set()


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_asha_stops_bad_trials(ray_cluster: None, searcher: str) -> None:
    """More than half of the trials below the median are stopped before their last step."""
    records = list(study(searcher, "asha").records.values())
    bad = sorted(records, key=lambda record: quality(record.spec))[: len(records) // 2]
    assert sum(record.status == "stopped" for record in bad) > len(bad) / 2


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_pbt_copies_what_is_better(ray_cluster: None, searcher: str) -> None:
    """A copy continues from the other trial's value and init at the same step.

    It changes the learning rate within the space and never loses a better result.
    """
    done = study(searcher, "pbt")
    curves = {(report.trial, report.step): report for report in done.heard.reports}
    copies = [report for report in done.heard.reports if report.copied is not None]
    assert copies
    rates = [0.001, 10.0]
    for report in copies:
        copied, before = report.copied, curves[report.trial, report.step - EVERY]
        assert copied is not None and copied.step == before.step and copied.source != report.trial
        source = curves[copied.source, copied.step]
        assert source.score > before.score
        rate = copied.spec.learning_rate
        assert rates[0] <= rate <= rates[1]
        went_on = source.metrics["accuracy"]
        for _ in range(EVERY):
            went_on += PACE * (quality(copied.spec) - went_on)
        assert report.metrics["accuracy"] == went_on
    for name in done.records:
        scores = [report.score for report in done.heard.reports if report.trial == name]
        assert scores == sorted(scores)


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_a_population_does_better_than_the_same_trials_alone(
    ray_cluster: None, searcher: str
) -> None:
    """The mean result is higher than without a scheduler, with the same trials and steps.

    The best result is not worse.
    """
    alone, together = (
        [record.metrics["accuracy"] for record in study(searcher, scheduler).records.values()]
        for scheduler in ("fifo", "pbt")
    )
    assert sum(together) > sum(alone)
    assert max(together) >= max(alone)


def test_optuna_learns_while_the_search_runs(ray_cluster: None) -> None:
    """Proposals after the first half, which is drawn at random, depend on earlier results."""
    done, other = study("optuna", "fifo"), study("optuna", "asha")
    first = TRIALS // 2
    specs, others = ([record.spec for record in one.records.values()] for one in (done, other))
    assert (
        specs[:first] == others[:first] == draw(done.job.search.space, first, done.job.search.seed)
    )
    assert specs[first:] != others[first:]
