"""A simulation of a search that forecasts its steps and seconds.

It plays the trials through on their slots and stops them as the scheduler would. How good the
trials are is not known in advance: each trial gets a random rank that it keeps to its end. The
results are averaged over many draws, which are the same each time. The simulation trains nothing.
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
MEDIAN_SAMPLES = 3  # other trials that the median rule needs for a decision


@dataclass(frozen=True)
class Pace:
    """The seconds of a step and of an evaluation in one worker, by its number of trials."""

    step_alone: float
    step_packed: float
    evaluation_alone: float
    evaluation_packed: float
    packed: int
    """Number of trials that the packed figures were measured with."""

    def step(self, trials: int) -> float:
        """Return the seconds of a step of so many trials together."""
        return self._between(self.step_alone, self.step_packed, trials)

    def evaluation(self, trials: int) -> float:
        """Return the seconds of an evaluation of so many trials together."""
        return self._between(self.evaluation_alone, self.evaluation_packed, trials)

    def _between(self, alone: float, packed: float, trials: int) -> float:
        """Interpolate linearly between one trial and ``packed`` trials."""
        part = (trials - 1) / (self.packed - 1) if self.packed > 1 else trials - 1
        return alone + (packed - alone) * part if self.packed > 1 else alone * (1 + part)


@dataclass(frozen=True)
class Forecast:
    """The expected course of a search.

    ``reached`` is the number of trials that reach each step of ``rungs``. ``steps`` and ``reports``
    are totals over all trials. ``spread`` holds the 10th and 90th percentile of ``seconds`` over
    the draws.
    """

    rungs: tuple[int, ...]
    reached: tuple[float, ...]
    steps: float
    reports: float
    seconds: float
    spread: tuple[float, float]


def rungs(search: SearchSpec, train: TrainSpec) -> tuple[int, ...]:
    """Return the steps of ASHA's rungs, or the first step at which the median rule may stop.

    The last step is always included; it is the only one without a scheduler.
    """
    match search.scheduler:
        case "fifo":
            return (train.steps,)
        case "median" | "pbt":
            return tuple(dict.fromkeys((_grace(search, train), train.steps)))
        case "asha":
            return tuple(dict.fromkeys((*_asha_rungs(search, train), train.steps)))


def _grace(search: SearchSpec, train: TrainSpec) -> int:
    """Return the first step at which a scheduler may stop a trial."""
    return min(search.grace_steps or train.evaluate_every, train.steps)


def _asha_rungs(search: SearchSpec, train: TrainSpec) -> list[int]:
    """Return the steps of ASHA's rungs, which the last step need not be one of."""
    grace = _grace(search, train)
    count = int(math.log(train.steps / grace) / math.log(search.reduction_factor) + 1)
    return [grace * search.reduction_factor**k for k in range(count)]


def forecast(
    search: SearchSpec,
    train: TrainSpec,
    trials: int,
    workers: int,
    slots: int,
    pace: Pace,
    report_s: float = 0.0,
) -> Forecast:
    """Forecast the search with ``slots`` trials in each of ``workers`` workers.

    A report costs ``report_s`` seconds in addition to the ``pace``.
    """
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
    """Shuffle the trials' ranks, which lie in [0, 1); the number of the draw is the seed."""
    ranks = [place / trials for place in range(trials)]
    random.Random(draw).shuffle(ranks)
    return ranks


@dataclass
class _Run:
    """A simulated search of one draw: trial k has ``rank[k]``, and a higher rank is better."""

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
        """Simulate the search until all trials have ended."""
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
        """Advance the trials to their next evaluation, and return the seconds of that round."""
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
        """Pass a trial's report to the stopping rule; returns whether the trial goes on."""
        self.reports += 1
        goes_on = self._goes_on(trial, self.reach[trial], self.rank[trial])
        return goes_on and self.reach[trial] < self.train.steps


def stopping_rule(search: SearchSpec, train: TrainSpec) -> Callable[[int, int, float], bool]:
    """Make the scheduler's ``rule(trial, step, score)``, which says whether the trial goes on.

    The rule keeps the scores of its earlier calls.
    """
    match search.scheduler:
        case "asha":
            return _Asha(search, train)
        case "median":
            return _Median(_grace(search, train))
        case "fifo" | "pbt":
            return lambda trial, step, score: True


class _Asha:
    """The stopping rule of Ray Tune's asynchronous successive halving (Li et al. 2020).

    It decides at the highest rung that the trial has reached and was not yet seen at.
    """

    def __init__(self, search: SearchSpec, train: TrainSpec) -> None:
        self._keeps = 1 - 1 / search.reduction_factor
        self._last = train.steps
        self._rungs: list[tuple[int, list[float], set[int]]] = [
            (rung, [], set()) for rung in reversed(_asha_rungs(search, train))
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
    """The median stopping rule (Golovin et al. 2017).

    It stops a trial below the median of the other trials that came at least as far.
    """

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
    """Interpolate the quantile ``part``, from 0 to 1, of ascending values."""
    place = (len(ordered) - 1) * part
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
