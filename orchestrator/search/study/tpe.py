"""Trials proposed one after another by Optuna's TPE, each from what the ones before it reached. The only importer of
optuna.

A proposal depends on the spec, its number and the trials before it with their scores, and on nothing else: the sampler
is seeded anew each time, so that a history that was written down goes on as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.job.space import TrialSpec, dimensions, draw, trial_at, trial_count
from orchestrator.job.spec import LogUniform, SearchSpec, Uniform

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FIRST = 10  # spread proposals before TPE takes over, but at most half of the trials; as many as optuna has by default
ATTEMPTS = 8  # at a point that no trial had
ORDERED = (
    "num_virtual_tokens",
    "rank",
    "alpha",
    "bottleneck",
    "shots",
    "learning_rate",
)  # listed values of these lie on a scale
WORST = (
    1e30  # of a failed trial, in either direction: what led there is to be avoided, not forgotten
)


class Proposer:
    """Proposes trials of a space, no point twice; None once there are ``search.trials``, or the space has no more."""

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
        self._trials: list[Any] = []
        self._specs: list[TrialSpec] = []
        self._scores: dict[int, float | None] = {}

    def propose(self) -> TrialSpec | None:
        """The next trial; its number is how many came before."""
        number = len(self._specs)
        if number >= self.total:
            return None
        if number < len(self._spread):
            return self._take(self._spread[number])
        for attempt in range(ATTEMPTS):
            spec = self._ask(number, attempt)
            if spec not in self._specs:
                return self._take(spec)
        # TPE has settled on a point that has been: any other tells more.
        return next(map(self._take, self._new_points(number)), None)

    def learn(self, number: int, score: float | None) -> None:
        """The best score of a trial that is over; None when it failed, which counts as the worst there is.

        A trial that the scheduler stopped counts with what it had reached, as one that finished does: its score is the
        best of several evaluations and only grows with steps, so that a stopped trial is never rated too well.
        """
        if number in self._scores:
            return
        self._scores[number] = score
        worst = -WORST if self._search.better == "max" else WORST
        self._study.tell(self._trials[number], worst if score is None else score)

    def replay(self, configs: Mapping[int, dict[str, Any]]) -> list[TrialSpec]:
        """Take the trials of a search that goes on, by number; only before the first proposal. Returns all that are
        proposed now: one that was proposed and never started is proposed anew."""
        for number in range(max(configs, default=-1) + 1):
            if number in configs:
                self._take(TrialSpec.from_config(configs[number]))
            else:
                self.propose()
        return list(self._specs)

    @property
    def proposed(self) -> int:
        """How many trials were proposed."""
        return len(self._specs)

    @property
    def left(self) -> int:
        """How many may still be."""
        return self.total - self.proposed

    def _take(self, spec: TrialSpec) -> TrialSpec:
        """Make ``spec`` the next trial, whoever thought of it."""
        config = spec.config()
        self._study.enqueue_trial(
            {name: axis.place(config[name]) for name, axis in self._varied.items()}
        )
        self._trials.append(self._study.ask(self._distributions))
        self._specs.append(spec)
        return spec

    def _ask(self, number: int, attempt: int) -> TrialSpec:
        """What TPE would try next. The trial of the question itself counts for nothing."""
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
        """Points at random that no trial had, at least one while the space has any."""
        # Of one more different points than trials so far, one is new.
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
    """A dimension of the space as Optuna has it: a range as it is, listed values by their place in the list.

    Inits are one choice with an entry for each text and each artifact, so that a text is there only where the init is
    that text, and TPE tells texts apart.
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
        """The value that Optuna's answer stands for; None for a dimension that it was not asked about."""
        if self._range is not None:
            return found
        return self._values[found or 0]

    def place(self, value: Any) -> Any:
        """The reverse, from a trial's configuration."""
        return value if self._range is not None else self._written.index(value)
