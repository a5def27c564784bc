"""How many steps a search takes: its trials on their slots, stopped as the scheduler stops them, played through.

Nobody knows how good the trials are. A trial's rank is drawn at random and kept to its end; many draws are averaged,
always the same ones. Pure arithmetic.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.job.spec import SearchSpec, TrainSpec

DRAWS = 40
MEDIAN_SAMPLES = 3  # trials that the median rule needs to have seen


@dataclass(frozen=True)
class Pace:
    """Seconds of a step and of an evaluation of so many trials in one worker."""

    step_alone: float
    step_packed: float
    evaluation_alone: float
    evaluation_packed: float
    packed: int
    """Trials that the packed figures are of."""

    def step(self, trials: int) -> float:
        return self._between(self.step_alone, self.step_packed, trials)

    def evaluation(self, trials: int) -> float:
        return self._between(self.evaluation_alone, self.evaluation_packed, trials)

    def _between(self, alone: float, packed: float, trials: int) -> float:
        part = (trials - 1) / (self.packed - 1) if self.packed > 1 else trials - 1
        return alone + (packed - alone) * part if self.packed > 1 else alone * (1 + part)


@dataclass(frozen=True)
class Forecast:
    """What to expect: ``reached`` trials at each step of ``rungs``, trial ``steps``, ``reports``, ``seconds``.

    ``spread``: seconds that one draw in ten stays below, and one in ten exceeds.
    """

    rungs: tuple[int, ...]
    reached: tuple[float, ...]
    steps: float
    reports: float
    seconds: float
    spread: tuple[float, float]


def rungs(search: SearchSpec, train: TrainSpec) -> tuple[int, ...]:
    """Steps at which the scheduler may stop a trial, as ASHA cuts them, and the last step."""
    grace = min(search.grace_steps or train.evaluate_every, train.steps)
    if search.scheduler != "asha":
        return (
            (train.steps,)
            if search.scheduler == "fifo"
            else tuple(dict.fromkeys((grace, train.steps)))
        )
    count = int(math.log(train.steps / grace) / math.log(search.reduction_factor) + 1)
    return tuple(
        dict.fromkeys((*(grace * search.reduction_factor**k for k in range(count)), train.steps))
    )


def forecast(
    search: SearchSpec,
    train: TrainSpec,
    trials: int,
    workers: int,
    slots: int,
    pace: Pace,
    report_s: float = 0.0,
) -> Forecast:
    """The search's expected course: ``slots`` trials in each of ``workers``; a report costs ``report_s`` besides."""
    steps = rungs(search, train)
    draws = 1 if search.scheduler == "fifo" else DRAWS
    ran = [
        _Run(search, train, workers, slots, pace, report_s, _ranks(trials, draw))
        for draw in range(draws)
    ]
    for run in ran:
        run.play()
    seconds = sorted(run.seconds for run in ran)
    reached = [sum(reach >= step for run in ran for reach in run.reach) / draws for step in steps]
    return Forecast(
        steps,
        tuple(reached),
        sum(sum(run.reach) for run in ran) / draws,
        sum(run.reports for run in ran) / draws,
        sum(run.seconds for run in ran) / draws,
        (_quantile(seconds, 0.1), _quantile(seconds, 0.9)),
    )


def _ranks(trials: int, draw: int) -> list[float]:
    ranks = [place / trials for place in range(trials)]
    random.Random(draw).shuffle(ranks)
    return ranks


@dataclass
class _Run:
    """One draw: trial k ranks ``rank[k]``, more is better."""

    search: SearchSpec
    train: TrainSpec
    workers: int
    slots: int
    pace: Pace
    report_s: float
    rank: Sequence[float]
    reports: int = 0
    seconds: float = 0.0
    reach: list[int] = field(init=False)
    """The step at which each trial ended."""

    def __post_init__(self) -> None:
        self.reach = [0] * len(self.rank)
        self._goes_on = stopping_rule(self.search, self.train)

    def play(self) -> None:
        waiting = list(range(len(self.rank)))[::-1]
        rounds: list[tuple[float, int]] = [(0.0, worker) for worker in range(self.workers)]
        seated: list[list[int]] = [[] for _ in range(self.workers)]
        while rounds:
            now, worker = heapq.heappop(rounds)
            here = [trial for trial in seated[worker] if self._reports(trial)]
            while waiting and len(here) < self.slots:
                here.append(waiting.pop())
            seated[worker] = here
            if here:
                heapq.heappush(rounds, (now + self._round(here), worker))
            self.seconds = max(self.seconds, now)

    def _round(self, trials: list[int]) -> float:
        """Train the trials up to their next evaluation; the seconds that it takes."""
        every, most = self.train.evaluate_every, self.train.steps
        lengths = []
        for trial in trials:
            target = min(most, (self.reach[trial] // every + 1) * every)
            lengths.append(target - self.reach[trial])
            self.reach[trial] = target
        training = sum(
            self.pace.step(sum(length > step for length in lengths)) for step in range(max(lengths))
        )
        return training + self.pace.evaluation(len(trials)) + self.report_s * len(trials)

    def _reports(self, trial: int) -> bool:
        """A trial's report reaches the scheduler: whether the trial goes on."""
        self.reports += 1
        goes_on = self._goes_on(trial, self.reach[trial], self.rank[trial])
        return goes_on and self.reach[trial] < self.train.steps


def stopping_rule(search: SearchSpec, train: TrainSpec) -> Callable[[int, int, float], bool]:
    """``rule(trial, step, score)``: whether the trial goes on. It remembers what it was asked."""
    if search.scheduler == "asha":
        return _Asha(search, train)
    if search.scheduler == "median":
        return _Median(min(search.grace_steps or train.evaluate_every, train.steps))
    return lambda trial, step, score: True


class _Asha:
    """As Ray Tune's asynchronous halving (Li et al. 2020) decides: at a trial's highest rung that it is new to."""

    def __init__(self, search: SearchSpec, train: TrainSpec) -> None:
        grace = min(search.grace_steps or train.evaluate_every, train.steps)
        self._keeps = 1 - 1 / search.reduction_factor
        self._last = train.steps
        count = int(math.log(train.steps / grace) / math.log(search.reduction_factor) + 1)
        self._rungs: list[tuple[int, list[float], set[int]]] = [
            (grace * search.reduction_factor**k, [], set()) for k in reversed(range(count))
        ]

    def __call__(self, trial: int, step: int, score: float) -> bool:
        for milestone, scores, seen in self._rungs:
            if step < milestone or trial in seen:
                continue
            goes_on = not scores or score >= _quantile(scores, self._keeps)
            insort(scores, score)
            seen.add(trial)
            return goes_on
        return True


class _Median:
    """Stops what is below the median of the other trials that came as far (Golovin et al. 2017)."""

    def __init__(self, grace: int) -> None:
        self._grace = grace
        self._seen: dict[int, tuple[int, float]] = {}

    def __call__(self, trial: int, step: int, score: float) -> bool:
        self._seen[trial] = step, score
        others = sorted(
            found for other, (at, found) in self._seen.items() if other != trial and at >= step
        )
        return step < self._grace or len(others) < MEDIAN_SAMPLES or score >= _quantile(others, 0.5)


def _quantile(ordered: Sequence[float], part: float) -> float:
    place = (len(ordered) - 1) * part
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
