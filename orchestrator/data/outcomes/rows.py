"""The outcomes of a prompt on a set of rows, as columns in the rows' order, and their file.

They are what is needed to compute a metric again on a part of the rows. Shapes: B rows, C labels.

* with labels: the right label, the given label and the labels' log-probabilities [B, C]
* of every task: whether greedy decoding gave exactly the target, the target's negative
  log-likelihood, and its number of tokens
* of generated texts: each row's ROUGE-L and F1, and the counts [B, 10] that BLEU is made of
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]

TRUE = "label"
"""Index of the right label in the verbalizer, [B]."""
GIVEN = "given"
"""Index of the likeliest label in the verbalizer, [B]."""
LOG_PROBS = "log_probs"
"""Log-probability of each label among the labels, [B, C]."""
EXACT = "exact_match"
NLL = "nll"
TOKENS = "tokens"
ROUGE_L = "rouge_l"
F1 = "f1"
BLEU_COUNTS = "bleu"
"""For orders 1 to 4 the n-grams that match, then all n-grams, then both lengths in words, [B, 10].
"""
STORED: Mapping[str, tuple[Any, int]] = {
    TRUE: (np.int32, 1),
    GIVEN: (np.int32, 1),
    LOG_PROBS: (np.float32, 2),
    EXACT: (np.bool_, 1),
    NLL: (np.float32, 1),
    TOKENS: (np.int32, 1),
    ROUGE_L: (np.float32, 1),
    F1: (np.float32, 1),
    BLEU_COUNTS: (np.int32, 2),
}
"""The type of each column in a file, and its number of dimensions."""


@dataclass(frozen=True, eq=False)
class RowOutcomes:
    """Columns by name, each with an entry for every row."""

    columns: Mapping[str, Column]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def joined(self, other: RowOutcomes | None) -> RowOutcomes:
        """Return the columns of both, which are about the same rows."""
        return self if other is None else RowOutcomes({**self.columns, **other.columns})

    def to_bytes(self) -> bytes:
        """Write the columns as a compressed file of NumPy, without pickles."""
        stream = io.BytesIO()
        stored: dict[str, Any] = {
            name: column.astype(STORED[name][0]) for name, column in self.columns.items()
        }
        np.savez_compressed(stream, **stored)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> RowOutcomes | None:
        """Read a file of ``to_bytes``; None for anything else, since stores can be edited."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files if name in STORED}
        except (ValueError, OSError, KeyError, EOFError, BadZipFile, TypeError):
            return None
        return cls(columns) if _is_whole(columns) else None


def _is_whole(columns: Mapping[str, Column]) -> bool:
    """Tell whether the columns are as long as each other and of the types that are written."""
    if not columns or len({column.shape[:1] for column in columns.values()}) != 1:
        return False
    kinds = (
        column.dtype == STORED[name][0] and column.ndim == STORED[name][1]
        for name, column in columns.items()
    )
    return all(kinds)


class Measured(dict[str, float]):
    """Metrics by name, with the outcomes of the rows where they were asked for.

    It is a mapping like any other metrics, so it travels wherever metrics do.
    """

    outcomes: RowOutcomes | None = None

    @classmethod
    def with_outcomes(cls, metrics: Mapping[str, float], outcomes: RowOutcomes) -> Measured:
        measured = cls(metrics)
        measured.outcomes = outcomes
        return measured


def outcomes_of(metrics: Mapping[str, float]) -> RowOutcomes | None:
    """Return the outcomes that came with metrics; None if they were not asked for."""
    return metrics.outcomes if isinstance(metrics, Measured) else None
