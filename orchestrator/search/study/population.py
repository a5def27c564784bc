"""Population based training (Jaderberg et al. 2017): bad trials go on from what good ones are. Pure decisions.

Trials are compared with those that have been at the same step, whether these still train or not, and copy what those
were at that step. A trial's clock is therefore also the age of its prompt, however often it copied: no trial gets more
than ``train.steps`` steps, learning rate schedules hold, and trials that come late, because there are fewer slots than
trials, are not measured against prompts that had more steps.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.job.space import TrialSpec, dimensions, trial_count
from orchestrator.job.spec import JobSpec, LogUniform, Uniform
from orchestrator.tuning.reports import Copied, Report

QUARTER = 4  # one trial in so many counts as good, and one as bad; section 3 of the paper calls it truncation
FACTORS = (0.8, 1.2)  # of a learning rate


@dataclass(frozen=True)
class Member:
    """A trial at a step."""

    trial: str
    spec: TrialSpec
    rank: tuple[float, float]
    """Score and loss, greater is better."""
    checkpoint: bytes


@dataclass(frozen=True)
class Copy:
    """``trial`` goes on as ``copied`` says, from ``checkpoint``."""

    trial: str
    copied: Copied
    checkpoint: bytes


class Population:
    """Every trial's rank at each comparison, and the checkpoints of those that may be copied."""

    def __init__(self, job: JobSpec) -> None:
        self._seed = job.search.seed
        self._every = job.perturbation_steps
        self._sign = 1.0 if job.search.better == "max" else -1.0
        rates = dimensions(job.search.space)["learning_rate"]
        if isinstance(rates, LogUniform):
            rates = rates.loguniform
        elif isinstance(rates, Uniform):
            rates = rates.uniform
        self._low, self._high = min(rates), max(rates)
        self._most_good = -(-trial_count(job.search) // QUARTER)
        self._members: defaultdict[int, list[Member]] = defaultdict(list)

    def copies(
        self, reports: Iterable[tuple[Report, TrialSpec]], staying: Iterable[str]
    ) -> list[Copy]:
        """Take a round's reports and the trials' specs; answer with what the ``staying`` trials copy."""
        steps = {}
        for report, spec in reports:
            if self.compares(report):
                steps[report.trial] = report.step
                self.add(report, spec)
        found = [self.copy(trial, steps[trial]) for trial in staying if trial in steps]
        return [copy for copy in found if copy is not None]

    def compares(self, report: Report) -> bool:
        """Whether trials are compared at this report."""
        return report.step % self._every == 0 and bool(report.metrics)

    def add(self, report: Report, spec: TrialSpec) -> None:
        """A trial's comparison, as ``spec``; with its checkpoint, or it is never copied."""
        rank = (self._sign * report.score, -report.best_metrics["loss"])
        members = [one for one in self._members[report.step] if one.trial != report.trial]
        members.append(Member(report.trial, spec, rank, report.checkpoint))
        members.sort(key=lambda member: (member.rank, member.trial), reverse=True)
        # Nobody rises as more trials come, so that who is not among the good ones of all trials will never be copied.
        good = members[: self._most_good]
        self._members[report.step] = [
            *good,
            *(replace(one, checkpoint=b"") for one in members[self._most_good :]),
        ]

    def copy(self, trial: str, step: int) -> Copy | None:
        """What a trial that was compared at ``step`` copies, if anything.

        By score, not by the newest metric: a trial's result is its best evaluation, and a copy must not lose it."""
        members = self._members[step]
        part = min(-(-len(members) // QUARTER), len(members) // 2)
        place = next(place for place, member in enumerate(members) if member.trial == trial)
        rng = random.Random(f"{self._seed} {trial} {step}")
        better = [
            one for one in members[:part] if one.rank > members[place].rank and one.checkpoint
        ]
        if place < len(members) - part or not better:
            return None
        source = rng.choice(better)
        rate = self._perturbed(source.spec.learning_rate, rng)
        # The seed stays: it is the order of the rows, in which the copy is to differ from its source.
        spec = replace(source.spec, learning_rate=rate, seed=members[place].spec.seed)
        return Copy(trial, Copied(source.trial, step, spec), source.checkpoint)

    def _perturbed(self, rate: float, rng: random.Random) -> float:
        """Another learning rate of the space; at an end of it, away from that end."""
        around = [min(max(rate * factor, self._low), self._high) for factor in FACTORS]
        chosen: float = rng.choice([one for one in around if one != rate])
        return chosen
