"""Metrics of a user's own, good and bad, as jobs of tests name them."""

from __future__ import annotations

from typing import Any

CALLS: list[tuple[Any, Any, Any]] = []


def share_of_right(predictions: Any, references: Any, scores: Any) -> float:
    """Compute the accuracy, and remember the arguments."""
    CALLS.append((predictions, references, scores))
    pairs = zip(predictions, references, strict=True)
    return sum(prediction == reference for prediction, reference in pairs) / len(references)


def cost(predictions: Any, references: Any, scores: Any) -> int:
    """Count wrong rows; fewer are better, and the value is no share."""
    return sum(said != true for said, true in zip(predictions, references, strict=True))


def exact_texts(predictions: Any, references: Any, scores: Any) -> float:
    """Compute the share of texts that are among their references."""
    CALLS.append((predictions, references, scores))
    return sum(text in right for text, right in zip(predictions, references, strict=True)) / len(
        predictions
    )


def no_number(predictions: Any, references: Any, scores: Any) -> float:
    return float("nan")


def endless(predictions: Any, references: Any, scores: Any) -> float:
    return float("inf")


def nothing(predictions: Any, references: Any, scores: Any) -> None:
    return None


def broken(predictions: Any, references: Any, scores: Any) -> float:
    raise KeyError("spam")


def too_few(predictions: Any, references: Any) -> float:
    return 0.0


no_function = 3
