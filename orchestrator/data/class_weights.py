"""Weights of training rows by their label, for data in which some labels are rare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from orchestrator.data.template import Verbalizer
from orchestrator.job.labels import Label, label_key

ClassWeights: TypeAlias = Literal["balanced"] | dict[Label, float]


def row_weights(
    weights: ClassWeights, labels: Sequence[int], verbalizer: Verbalizer
) -> list[float]:
    """Return the weight of each row, from its label's index in the verbalizer.

    ``balanced`` gives all labels that occur the same total weight, and the rows a mean weight of 1:
    rows / (labels that occur * rows of the label), as scikit-learn does. A label that a mapping
    does not name has weight 1.
    """
    if isinstance(weights, str):
        counts = Counter(labels)
        by_label = {label: len(labels) / (len(counts) * rows) for label, rows in counts.items()}
    else:
        keyed = {label_key(label): weight for label, weight in weights.items()}
        by_label = {
            index: keyed.get(label_key(label), 1.0) for index, label in enumerate(verbalizer.labels)
        }
    return [by_label[label] for label in labels]
