"""Trials proposed by Optuna's TPE, each from the results of the earlier ones.

This is the only importer of optuna. A proposal depends only on the spec, its number, and the
earlier trials with their scores. The sampler is seeded anew each time, so that a resumed search
continues as it would have without the interruption.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.job.space import TrialSpec, dimensions, draw, trial_at, trial_count
from orchestrator.job.spec import LogUniform, SearchSpec, Uniform

if TYPE_CHECKING:
    import optuna

METHOD = "method"
"""Optuna's name of the choice of a method, an index, in a search that mixes several."""
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
        self._axes = {
            method: {name: _Axis(name, value) for name, value in dimensions(space).items()}
            for method, space in search.space.parts.items()
        }
        self._methods = list(self._axes)
        first = max(min(FIRST, (self.total + 1) // 2), len(self._methods))
        self._spread = draw(search.space, first, search.seed)
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
        config, method = spec.config(), spec.method
        places = {
            _name(method, name): axis.place(config[name])
            for name, axis in self._axes[method].items()
            if axis.varies
        }
        if len(self._methods) > 1:
            places[METHOD] = self._methods.index(method)
        self._study.enqueue_trial(places)
        trial = self._study.ask()
        self._suggest(trial)
        self._trials.append(trial)
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
        asked = self._study.ask()
        spec = self._suggest(asked)
        self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return spec

    def _suggest(self, trial: optuna.Trial) -> TrialSpec:
        """Have the sampler choose a method, where there are several, and then its own dimensions.

        So each dimension is chosen from the results of the trials of its method alone.
        """
        method = self._methods[0]
        if len(self._methods) > 1:
            choices = range(len(self._methods))
            method = self._methods[trial.suggest_categorical(METHOD, choices)]
        axes = self._axes[method]
        row = [
            axis.value(axis.suggested(trial, _name(method, name))) for name, axis in axes.items()
        ]
        return replace(trial_at(row, list(axes)), method=method)

    def _new_points(self, number: int) -> list[TrialSpec]:
        """Return random points that no trial has had, at least one while the space has any."""
        # n + 1 distinct points cannot all be among n trials.
        seed = random.Random(f"{self._search.seed} {number}").randrange(2**32)
        drawn = draw(self._search.space, len(self._specs) + 1, seed)
        return [spec for spec in drawn if spec not in self._specs]


def _name(method: str, dimension: str) -> str:
    """Return Optuna's name of a dimension, of which each method has its own."""
    return f"{method}.{dimension}" if method else dimension


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

    def suggested(self, trial: optuna.Trial, name: str) -> Any:
        """Ask Optuna for a value of the dimension; None for a dimension that does not vary."""
        if isinstance(self._range, LogUniform):
            return trial.suggest_float(name, *self._range.loguniform, log=True)
        if isinstance(self._range, Uniform):
            return trial.suggest_float(name, *self._range.uniform)
        if not self.varies:
            return None
        last = len(self._values) - 1
        if self._ordered:
            return trial.suggest_int(name, 0, last)
        return trial.suggest_categorical(name, range(last + 1))

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
