"""Population based training (Jaderberg et al. 2017): bad trials continue from good ones.

This module only decides; it does no input or output. A trial is compared with all trials that have
been at the same step, whether these still train or not, and copies what another trial was at that
step. A trial's step is therefore also the age of its prompt, however often it copied. So no trial
gets more than ``train.steps`` steps and learning rate schedules hold. Trials that start late,
because there are fewer slots than trials, are not compared with prompts that had more steps.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.job.space import TrialSpec, dimensions, trial_count
from orchestrator.job.spec import JobSpec, LogUniform, Uniform
from orchestrator.tuning.reports import Copied, Report

# One trial in four counts as good, and one as bad (section 3 of the paper: truncation selection).
QUARTER = 4
FACTORS = (0.8, 1.2)  # by which a learning rate is multiplied


@dataclass(frozen=True)
class Member:
    """A trial at a step."""

    trial: str
    spec: TrialSpec
    rank: tuple[float, float]
    """Score and negative loss; greater is better. The score's sign is flipped if lower is
    better."""
    checkpoint: bytes


@dataclass(frozen=True)
class CopyDecision:
    """A decision that ``trial`` continues from ``checkpoint`` as ``copied`` describes."""

    trial: str
    copied: Copied
    checkpoint: bytes


class Population:
    """The rank of every trial at each comparison, and the checkpoints that may be copied."""

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
    ) -> list[CopyDecision]:
        """Record a round's reports, each with its trial's spec; return the copies to make.

        Only trials in ``staying`` copy others.
        """
        steps = {}
        for report, spec in reports:
            if self.compares(report):
                steps[report.trial] = report.step
                self.add(report, spec)
        found = [self.copy(trial, steps[trial]) for trial in staying if trial in steps]
        return [copy for copy in found if copy is not None]

    def compares(self, report: Report) -> bool:
        """Tell whether trials are compared at this report."""
        return report.step % self._every == 0 and bool(report.metrics)

    def add(self, report: Report, spec: TrialSpec) -> None:
        """Add a trial to the comparison at the report's step, as ``spec``.

        The trial can be copied only if the report has its checkpoint.
        """
        rank = (self._sign * report.score, -report.best_metrics["loss"])
        members = [one for one in self._members[report.step] if one.trial != report.trial]
        members.append(Member(report.trial, spec, rank, report.checkpoint))
        members.sort(key=lambda member: (member.rank, member.trial), reverse=True)
        # A trial's rank only falls as trials are added, so checkpoints outside the top quarter of
        # all trials can be dropped.
        good = members[: self._most_good]
        self._members[report.step] = [
            *good,
            *(replace(one, checkpoint=b"") for one in members[self._most_good :]),
        ]

    def copy(self, trial: str, step: int) -> CopyDecision | None:
        """Return what a trial that was compared at ``step`` copies, if anything.

        Trials are ranked by score, not by the newest metric: a trial's result is its best
        evaluation, and a copy must not lose that.
        """
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
        # The trial keeps its own seed, so that it sees the rows in another order than its source.
        spec = replace(source.spec, learning_rate=rate, seed=members[place].spec.seed)
        return CopyDecision(trial, Copied(source.trial, step, spec), source.checkpoint)

    def _perturbed(self, rate: float, rng: random.Random) -> float:
        """Return a changed learning rate within the space; at a bound, one away from that bound."""
        around = [min(max(rate * factor, self._low), self._high) for factor in FACTORS]
        chosen: float = rng.choice([one for one in around if one != rate])
        return chosen
