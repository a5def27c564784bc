"""Metrics of labels, from counts of answers and from the labels' probabilities.

The definitions are scikit-learn's. Shapes: B rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.job.labels import Label

Counts = NDArray[np.int64]
Scores = NDArray[Any]
CLASS_FIGURES = ("precision", "recall", "f1", "support")
"""The figures that ``per_class`` gives for each label."""
CALIBRATION_BINS = 15
"""Number of bins of the expected calibration error (Guo et al. 2017)."""


def count_metrics(counts: Counts) -> dict[str, float]:
    """Compute the metrics that follow from counts [C, C] of true and given labels."""
    f1, support = _f1(counts), counts.sum(1)
    occurs = (support + counts.sum(0)) > 0
    return {
        "macro_f1": float(f1[occurs].mean()),
        "weighted_f1": float(f1 @ support / support.sum()),
        "mcc": matthews_correlation(counts),
    }


def per_class(counts: Counts) -> list[dict[str, float | int]]:
    """Compute precision, recall, F1 and support of each label, from counts [C, C].

    A ratio without a denominator is 0: the precision of a label that no row got, and the recall of
    a label that no row has.
    """
    right = counts.diagonal()
    support = counts.sum(1)
    columns = (_ratio(right, counts.sum(0)), _ratio(right, support), _f1(counts), support)
    return [
        dict(zip(CLASS_FIGURES, figures, strict=True))
        for figures in zip(*(column.tolist() for column in columns), strict=True)
    ]


def labelled_figures(
    labels: Sequence[Label], counts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return the figures of ``per_class`` with each label, as JSON documents have them."""
    figures = per_class(np.array(counts))
    return [{"label": label, **own} for label, own in zip(labels, figures, strict=True)]


def matthews_correlation(counts: Counts) -> float:
    """Compute Matthews' correlation from counts [C, C]; 0 if all rows have or got one label."""
    true, given = (counts.sum(axis).astype(np.float64) for axis in (1, 0))
    rows = float(counts.sum())
    covariance = float(np.trace(counts)) * rows - float(true @ given)
    spread = (rows**2 - float(true @ true)) * (rows**2 - float(given @ given))
    return covariance / float(np.sqrt(spread)) if spread else 0.0


def roc_auc(labels: Sequence[int], scores: Scores) -> float | None:
    """Compute the area under the ROC curve from scores [B, C], where higher is likelier.

    With two labels it is the area of the second one, otherwise the mean over each label against the
    rest. None if a label has no row or no other label has one: the area is undefined then. NaN if a
    score is NaN.
    """
    true = np.asarray(labels)
    count = scores.shape[1]
    if np.isnan(scores).any():
        return float("nan")
    support = np.bincount(true, minlength=count)
    if (support == 0).any() or count < 2:
        return None
    judged = [1] if count == 2 else range(count)
    return float(np.mean([_area(true == label, scores[:, label]) for label in judged]))


def _area(positive: NDArray[np.bool_], scores: Scores) -> float:
    """Return the share of (positive, negative) pairs in the right order; a tie counts half."""
    _, place, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks = (last - (sizes - 1) / 2)[place]
    count = int(positive.sum())
    above = float(ranks[positive].sum()) - count * (count + 1) / 2
    return above / (count * (len(positive) - count))


def calibration_counts(confidences: Scores, right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sum up rows [B] in bins: an array [3, bins] of rows, confidences and right rows.

    A bin includes its upper bound. Sums of several batches add up. A NaN makes the sums NaN.
    """
    sums = np.zeros((3, CALIBRATION_BINS))
    if np.isnan(confidences).any():
        return np.full_like(sums, np.nan)
    place = calibration_bins(confidences)
    for row, values in enumerate((np.ones(len(place)), confidences, right.astype(np.float64))):
        np.add.at(sums[row], place, values)
    return sums


def calibration_bins(confidences: Scores) -> NDArray[np.int64]:
    """Return the index of each row's bin, [B]."""
    upper = np.ceil(confidences * CALIBRATION_BINS).astype(np.int64)
    place: NDArray[np.int64] = np.clip(upper, 1, CALIBRATION_BINS) - 1
    return place


def calibration_error(sums: NDArray[np.float64]) -> float:
    """Compute the expected calibration error from the sums of ``calibration_counts``."""
    rows, confidence, right = sums
    return float(np.abs(confidence - right).sum() / rows.sum())


def _f1(counts: Counts) -> NDArray[np.float64]:
    return _ratio(2 * counts.diagonal(), counts.sum(0) + counts.sum(1))


def _ratio(above: Counts, below: Counts) -> NDArray[np.float64]:
    zeros = np.zeros(len(above))
    return np.divide(above, below, out=zeros, where=below > 0)
