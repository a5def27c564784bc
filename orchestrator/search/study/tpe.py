"""Trials proposed by Optuna's TPE, each from the results of the earlier ones.

This is the only importer of optuna. A proposal depends only on the spec, its number, and the
earlier trials with their scores. The sampler is seeded anew each time, so that a resumed search
continues as it would have without the interruption.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.job.space import TrialSpec, dimensions, draw, trial_at, trial_count
from orchestrator.job.spec import LogUniform, SearchSpec, Uniform

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Spread proposals before TPE takes over, at most half of the trials. Optuna's default is the same.
FIRST = 10
ATTEMPTS = 8  # tries to get a point from TPE that no trial has had
# Dimensions whose listed values lie on a scale.
ORDERED = (
    "num_virtual_tokens",
    "rank",
    "alpha",
    "bottleneck",
    "shots",
    "learning_rate",
)
# Score of a failed trial, with the sign of the worse direction. TPE is told of failures, so that it
# avoids what led to them.
WORST = 1e30


class Proposer:
    """A source of trials that proposes no point of the space twice.

    It proposes None once there are ``search.trials`` trials, or the space has no more points.
    """

    def __init__(self, search: SearchSpec) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.total = trial_count(search)
        self._search = search
        self._axes = {name: _Axis(name, value) for name, value in dimensions(search.space).items()}
        self._spread = draw(search.space, min(FIRST, (self.total + 1) // 2), search.seed)
        self._study = optuna.create_study(
            direction="maximize" if search.better == "max" else "minimize"
        )
        self._trials: list[optuna.Trial] = []
        self._specs: list[TrialSpec] = []
        self._scores: dict[int, float | None] = {}

    def propose(self) -> TrialSpec | None:
        """Return the next trial, whose number is the count of earlier trials."""
        number = len(self._specs)
        if number >= self.total:
            return None
        if number < len(self._spread):
            return self._take(self._spread[number])
        for attempt in range(ATTEMPTS):
            spec = self._ask(number, attempt)
            if spec not in self._specs:
                return self._take(spec)
        # TPE repeats points that trials have had already: any new point is more informative.
        return next(map(self._take, self._new_points(number)), None)

    def learn(self, number: int, score: float | None) -> None:
        """Record the best score of a trial that is over; None when it failed, the worst score.

        A trial that the scheduler stopped counts with the score that it had reached, like a
        finished trial. Its score is the best of several evaluations and can only improve with
        steps, so a stopped trial is never rated too well.
        """
        if number in self._scores:
            return
        self._scores[number] = score
        worst = -WORST if self._search.better == "max" else WORST
        self._study.tell(self._trials[number], worst if score is None else score)

    def replay(self, started: Mapping[int, TrialSpec]) -> list[TrialSpec]:
        """Take over the trials of a resumed search, by number; only before the first proposal.

        Return all trials proposed so far. A trial that was proposed but never started is proposed
        anew.
        """
        for number in range(max(started, default=-1) + 1):
            if number in started:
                self._take(started[number])
            else:
                self.propose()
        return list(self._specs)

    @property
    def proposed(self) -> int:
        """The number of trials that were proposed."""
        return len(self._specs)

    @property
    def left(self) -> int:
        """The number of trials that may still be proposed."""
        return self.total - self.proposed

    def _take(self, spec: TrialSpec) -> TrialSpec:
        """Make ``spec`` the next trial, wherever it comes from."""
        config = spec.config()
        self._study.enqueue_trial(
            {name: axis.place(config[name]) for name, axis in self._varied.items()}
        )
        self._trials.append(self._study.ask(self._distributions))
        self._specs.append(spec)
        return spec

    def _ask(self, number: int, attempt: int) -> TrialSpec:
        """Return the trial that TPE would try next.

        The Optuna trial that is created for this question is marked as failed, so that it counts
        for nothing.
        """
        import optuna

        seed = random.Random(f"{self._search.seed} {number} {attempt}").randrange(2**32)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, constant_liar=True
        )
        asked = self._study.ask(self._distributions)
        self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        found = asked.params
        return trial_at(
            [axis.value(found.get(name)) for name, axis in self._axes.items()], list(self._axes)
        )

    def _new_points(self, number: int) -> list[TrialSpec]:
        """Return random points that no trial has had, at least one while the space has any."""
        # n + 1 distinct points cannot all be among n trials.
        seed = random.Random(f"{self._search.seed} {number}").randrange(2**32)
        drawn = draw(self._search.space, len(self._specs) + 1, seed)
        return [spec for spec in drawn if spec not in self._specs]

    @property
    def _varied(self) -> dict[str, _Axis]:
        return {name: axis for name, axis in self._axes.items() if axis.varies}

    @property
    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: axis.distribution() for name, axis in self._varied.items()}


class _Axis:
    """A dimension of the space in Optuna's terms: a range as it is, listed values by index.

    The inits are a single categorical choice, with an entry for each text and each artifact. So a
    text only occurs where the init is that text, and TPE can tell texts apart.
    """

    def __init__(self, name: str, values: Any) -> None:
        self._range = values if isinstance(values, LogUniform | Uniform) else None
        self._ordered = name in ORDERED
        self._values: list[Any] = []
        if self._range is None:
            self._values = sorted(values) if self._ordered else list(values)
        self._written = [
            value.model_dump() if hasattr(value, "model_dump") else value for value in self._values
        ]

    @property
    def varies(self) -> bool:
        return self._range is not None or len(self._values) > 1

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if isinstance(self._range, LogUniform):
            return FloatDistribution(*self._range.loguniform, log=True)
        if isinstance(self._range, Uniform):
            return FloatDistribution(*self._range.uniform)
        last = len(self._values) - 1
        return (
            IntDistribution(0, last) if self._ordered else CategoricalDistribution(range(last + 1))
        )

    def value(self, found: Any) -> Any:
        """Return the value that Optuna's answer stands for.

        ``found`` is None for a dimension that does not vary, about which Optuna was not asked.
        """
        if self._range is not None:
            return found
        return self._values[found or 0]

    def place(self, value: Any) -> Any:
        """Return Optuna's representation of a value in a trial's configuration."""
        return value if self._range is not None else self._written.index(value)
