"""How sure a difference between two prompts on the same rows is.

Right and wrong rows are compared by McNemar's test in its exact form: of the rows that only one of
the two prompts got right, each is as likely to be either's if the prompts are equally good. All
other metrics are compared by a paired bootstrap: the metric's difference over samples of the rows.
``interval`` says the same of one prompt's metric alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.data.outcomes.statistics import Statistic, right_rows, statistic_of

Test = Literal["McNemar", "paired bootstrap"]
SAMPLES = 2000
SEED = 0
SIGNIFICANT = 0.05
"""The p value below which a difference is more than noise."""

SMALLEST = 0.0001
"""The smallest p value that is written in full."""


@dataclass(frozen=True)
class Confidence:
    """The result of a test of the difference between a prompt and the champion."""

    test: Test
    rows: int
    p_value: float
    """Probability of a difference at least as large between equally good prompts, two-sided."""
    low: float
    """The lower end of the difference's 95 % interval: the prompt's value minus the champion's."""
    high: float
    better: int | None = None
    """Rows that only this prompt got right; None for metrics that don't count right rows."""
    worse: int | None = None
    """Rows that only the champion got right."""

    @property
    def is_significant(self) -> bool:
        return self.p_value < SIGNIFICANT

    def clause(self) -> str:
        """Write the result as the end of a sentence about the difference."""
        interval = f"95 % interval of the difference {self.low:.3g} to {self.high:.3g}"
        shown = f"= {self.p_value:.2g}" if self.p_value >= SMALLEST else f"< {SMALLEST:g}"
        p_value = f"p {shown} ({self.test})"
        if self.better is None or self.worse is None:
            return f"{p_value}, {interval}, {self.rows} rows"
        counts = f"{self.better} rows better, {self.worse} worse of {self.rows}"
        return f"{counts}, {p_value}, {interval}"

    def document(self) -> dict[str, Any]:
        """Return the result in JSON's types."""
        return {**asdict(self), "significant": self.is_significant}


def confidence(mine: RowOutcomes, champion: RowOutcomes, metric: str) -> Confidence | None:
    """Test a metric's difference between two prompts on the same rows in the same order.

    None if the outcomes don't determine the metric, or are of different numbers of rows.
    """
    if mine.rows != champion.rows or not mine.rows:
        return None
    right = right_rows(mine, metric), right_rows(champion, metric)
    if right[0] is not None and right[1] is not None:
        return _mcnemar(right[0], right[1])
    statistics = statistic_of(mine, metric), statistic_of(champion, metric)
    if statistics[0] is None or statistics[1] is None:
        return None
    return _bootstrap(statistics[0], statistics[1], mine.rows)


def interval(outcomes: RowOutcomes, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a prompt's metric over samples of its rows.

    None if the outcomes don't determine the metric, or most samples of the rows.
    """
    statistic = statistic_of(outcomes, metric)
    if statistic is None or not outcomes.rows:
        return None
    source = np.random.default_rng(SEED)
    rows = outcomes.rows
    values = np.array([statistic(source.integers(0, rows, rows)) for _ in range(SAMPLES)])
    values = values[np.isfinite(values)]
    return _interval(values) if len(values) >= SAMPLES / 2 else None


def _mcnemar(mine: NDArray[np.bool_], champion: NDArray[np.bool_]) -> Confidence:
    better, worse = int((mine & ~champion).sum()), int((champion & ~mine).sum())
    rows = len(mine)
    shares = [better / rows, worse / rows, (rows - better - worse) / rows]
    samples = np.random.default_rng(SEED).multinomial(rows, shares, SAMPLES)
    low, high = _interval((samples[:, 0] - samples[:, 1]) / rows)
    p_value = binomial_p(better, worse)
    return Confidence("McNemar", rows, p_value, low, high, better, worse)


def binomial_p(better: int, worse: int) -> float:
    """Compute the two-sided p value of McNemar's exact test.

    It is twice the probability of at most as many heads as the smaller count, in as many tosses of
    a fair coin as both counts together.
    """
    tosses, fewer = better + worse, min(better, worse)
    ways = tail = 1
    for heads in range(fewer):
        ways = ways * (tosses - heads) // (heads + 1)
        tail += ways
    share: float = 2 * tail / 2**tosses
    return min(1.0, share)


def _bootstrap(mine: Statistic, champion: Statistic, rows: int) -> Confidence | None:
    """Resample the rows, the same for both prompts.

    Samples in which the metric has no value are left out, such as those without a rare label.
    """
    source = np.random.default_rng(SEED)
    differences = []
    for _ in range(SAMPLES):
        sample = source.integers(0, rows, rows)
        differences.append(mine(sample) - champion(sample))
    values = np.array(differences)
    values = values[np.isfinite(values)]
    if len(values) < SAMPLES / 2:
        return None
    tail = min(int((values <= 0).sum()), int((values >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(values) + 1))
    low, high = _interval(values)
    return Confidence("paired bootstrap", rows, p_value, low, high)


def _interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
