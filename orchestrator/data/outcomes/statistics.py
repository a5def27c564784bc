"""Metrics as functions of a choice of rows, for resampling.

Each function takes the indices of the rows, in which a row may occur several times. Shapes: B rows,
C labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.outcomes import rows as row
from orchestrator.data.outcomes.label_metrics import (
    CALIBRATION_BINS,
    calibration_bins,
    calibration_error,
    count_metrics,
)
from orchestrator.data.outcomes.rows import Column, RowOutcomes

Rows = NDArray[np.intp]
Statistic = Callable[[Rows], float]
RIGHT_OR_WRONG = ("accuracy", "exact_match")
"""Metrics that are a share of right rows."""


def right_rows(outcomes: RowOutcomes, metric: str) -> NDArray[np.bool_] | None:
    """Tell for each row whether it is right, by a metric that counts right rows."""
    columns = outcomes.columns
    if metric == "exact_match" and row.EXACT in columns:
        return columns[row.EXACT].astype(bool)
    if metric == "accuracy" and _has(outcomes, row.TRUE, row.GIVEN):
        return np.asarray(columns[row.TRUE] == columns[row.GIVEN])
    return None


def statistic_of(outcomes: RowOutcomes, metric: str) -> Statistic | None:
    """Return a metric as a function of rows.

    None if the rows' outcomes don't determine it: a metric of the user's own, or one whose columns
    are missing.
    """
    if (needed := NEEDED.get(metric)) is None or not _has(outcomes, *needed):
        return None
    return STATISTICS[metric](outcomes)


def _has(outcomes: RowOutcomes, *names: str) -> bool:
    return all(name in outcomes.columns for name in names)


def _mean_right(metric: str) -> Callable[[RowOutcomes], Statistic]:
    def make(outcomes: RowOutcomes) -> Statistic:
        right = right_rows(outcomes, metric)
        assert right is not None  # statistic_of has looked for the columns
        return _mean(right.astype(np.float64))

    return make


def _mean_of(column: str) -> Callable[[RowOutcomes], Statistic]:
    return lambda outcomes: _mean(outcomes.columns[column].astype(np.float64))


def _mean(values: Column) -> Statistic:
    return lambda rows: float(values[rows].mean())


def _loss(outcomes: RowOutcomes) -> Statistic:
    nll = outcomes.columns[row.NLL].astype(np.float64)
    tokens = outcomes.columns[row.TOKENS].astype(np.float64)
    return lambda rows: float(nll[rows].sum() / tokens[rows].sum())


def _of_counts(metric: str) -> Callable[[RowOutcomes], Statistic]:
    def make(outcomes: RowOutcomes) -> Statistic:
        true, given = outcomes.columns[row.TRUE], outcomes.columns[row.GIVEN]
        labels = int(max(true.max(), given.max())) + 1
        cells = true.astype(np.int64) * labels + given

        def value(rows: Rows) -> float:
            counts = np.bincount(cells[rows], minlength=labels * labels)
            return count_metrics(counts.reshape(labels, labels))[metric]

        return value

    return make


def _calibration(outcomes: RowOutcomes) -> Statistic:
    confidences = np.exp(outcomes.columns[row.LOG_PROBS].astype(np.float64).max(1))
    right = (outcomes.columns[row.TRUE] == outcomes.columns[row.GIVEN]).astype(np.float64)
    bins = calibration_bins(confidences)

    def value(rows: Rows) -> float:
        chosen = bins[rows]
        weights = (None, confidences[rows], right[rows])
        sums = [np.bincount(chosen, weight, CALIBRATION_BINS) for weight in weights]
        return calibration_error(np.array(sums, dtype=np.float64))

    return value


def _roc_auc(outcomes: RowOutcomes) -> Statistic:
    true = outcomes.columns[row.TRUE]
    scores = outcomes.columns[row.LOG_PROBS].astype(np.float64)
    labels = scores.shape[1]
    judged = [1] if labels == 2 else range(labels)
    areas = [_area(true == label, scores[:, label]) for label in judged]
    return lambda rows: float(np.mean([area(rows) for area in areas]))


def _area(positive: NDArray[np.bool_], scores: Column) -> Statistic:
    """Return the area of one label against the rest; NaN for rows of one kind only."""
    levels, level = np.unique(scores, return_inverse=True)
    cells = 2 * level + positive

    def value(rows: Rows) -> float:
        counts = np.bincount(cells[rows], minlength=2 * len(levels)).reshape(-1, 2)
        negatives, positives = counts.T
        pairs = float(negatives.sum()) * float(positives.sum())
        below = np.cumsum(negatives) - negatives / 2  # a tie counts half
        return float(positives @ below) / pairs if pairs else float("nan")

    return value


def _bleu(outcomes: RowOutcomes) -> Statistic:
    counts = outcomes.columns[row.BLEU_COUNTS].astype(np.int64)
    return lambda rows: bleu_of_counts(counts[rows].sum(0))


def bleu_of_counts(sums: Column) -> float:
    """Compute corpus BLEU, 0 to 1, from the sums of the rows' counts [10]."""
    from sacrebleu.metrics.bleu import BLEU

    numbers = [int(value) for value in sums]
    score = BLEU.compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9], "exp")
    return min(1.0, float(score.score) / 100)


LABELS = (row.TRUE, row.GIVEN)
NEEDED = {
    "accuracy": LABELS,
    "macro_f1": LABELS,
    "weighted_f1": LABELS,
    "mcc": LABELS,
    "roc_auc": (row.TRUE, row.LOG_PROBS),
    "ece": (*LABELS, row.LOG_PROBS),
    "rouge_l": (row.ROUGE_L,),
    "f1": (row.F1,),
    "bleu": (row.BLEU_COUNTS,),
    "exact_match": (row.EXACT,),
    "loss": (row.NLL, row.TOKENS),
}
"""The columns that each metric is computed from."""
STATISTICS: dict[str, Callable[[RowOutcomes], Statistic]] = {
    "accuracy": _mean_right("accuracy"),
    "macro_f1": _of_counts("macro_f1"),
    "weighted_f1": _of_counts("weighted_f1"),
    "mcc": _of_counts("mcc"),
    "roc_auc": _roc_auc,
    "ece": _calibration,
    "rouge_l": _mean_of(row.ROUGE_L),
    "f1": _mean_of(row.F1),
    "bleu": _bleu,
    "exact_match": _mean_right("exact_match"),
    "loss": _loss,
}
