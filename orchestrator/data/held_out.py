"""The choice of the rows to hold out for validation and test, so that every class keeps its share.

Rows with equal inputs form a group, which is held out or kept as a whole. A class's share of the
rows to hold out is rounded up or down to whole rows. Rare classes are rounded up first, so that
each is represented.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from orchestrator.data.cells import cell_text
from orchestrator.data.source_row import Row
from orchestrator.data.template import target_text
from orchestrator.job.spec import DataSpec

GROWTH = 4
"""Rare classes may enlarge a split by 1/GROWTH of its rows, and always by one row."""


@dataclass(frozen=True)
class _Class:
    """The distinct inputs of a class in the order drawn, and its exact share in rows."""

    inputs: list[str]
    share: float

    @property
    def can_spare(self) -> bool:
        """True if an input can be held out while another one is kept."""
        return len(self.inputs) > 1

    @property
    def whole_rows(self) -> int:
        """The share rounded down; 0 if the class can't spare an input."""
        return math.floor(round(self.share, 9)) if self.can_spare else 0

    @property
    def remainder(self) -> float:
        """The part of the share lost by rounding down; 0 if the class can't spare an input."""
        return round(self.share - self.whole_rows, 9) if self.can_spare else 0.0


def held_out_inputs(
    inputs: Sequence[str],
    labels: Sequence[str],
    fraction: float,
    seed: int,
    *,
    stays: int = 1,
    pool_rare: bool = False,
) -> set[str]:
    """Choose the inputs whose rows are held out, given each row's input and label.

    At least ``stays`` distinct inputs are kept. With ``pool_rare``, all labels that occur with a
    single input are treated as one class; otherwise such an input is not held out.
    """
    sizes = Counter(inputs)
    row_target = max(1, round(fraction * len(inputs)))
    classes = _draw(_inputs_by_label(inputs, labels, pool_rare), sizes, fraction, seed)
    shares = _whole_shares(classes, row_target, stays)
    chosen = _choose(classes, shares, sizes)
    if not chosen:  # no class has two inputs
        all_inputs = list(chain(*(label_class.inputs for label_class in classes)))
        chosen = _nearest(all_inputs, sizes, row_target)
    return set(chosen[: max(0, len(sizes) - stays)])


def label_of(row: Row, data: DataSpec) -> str:
    """Return a row's label as text, or the text to generate if there is no verbalizer."""
    cell = row[data.target]
    return target_text(cell) if data.verbalizer is None else cell_text(cell)


def _inputs_by_label(
    inputs: Sequence[str], labels: Sequence[str], pool_rare: bool
) -> list[list[str]]:
    """Group the distinct inputs by the label of their first row."""
    label_of: dict[str, str] = {}
    for text, label in zip(inputs, labels, strict=True):
        label_of.setdefault(text, label)
    by_label: dict[str, list[str]] = {}
    for text, label in label_of.items():
        by_label.setdefault(label, []).append(text)
    if not pool_rare:
        return list(by_label.values())
    pooled = [group[0] for group in by_label.values() if len(group) == 1]
    frequent = [group for group in by_label.values() if len(group) > 1]
    return [*frequent, pooled] if pooled else frequent


def _draw(
    groups: list[list[str]], sizes: Mapping[str, int], fraction: float, seed: int
) -> list[_Class]:
    """Shuffle the classes and the inputs of each class."""
    generator = random.Random(seed)
    generator.shuffle(groups)
    for group in groups:
        generator.shuffle(group)
    return [_Class(group, fraction * sum(sizes[text] for text in group)) for group in groups]


def _choose(
    classes: Sequence[_Class], shares: Sequence[int], sizes: Mapping[str, int]
) -> list[str]:
    """Choose inputs of each class.

    If a class gives too many or too few rows, because its groups have the wrong sizes, the next
    class makes up for it.
    """
    inputs: list[str] = []
    missing = 0
    for label_class, count in zip(classes, shares, strict=True):
        if not count:
            continue
        # Limit how much a class makes up for large groups of another.
        adjustment_limit = count // 2
        row_target = count + max(-adjustment_limit, min(adjustment_limit, missing))
        class_inputs = _nearest(label_class.inputs, sizes, row_target)
        missing += count - sum(sizes[text] for text in class_inputs)
        inputs += class_inputs
    return inputs


def _whole_shares(classes: Sequence[_Class], row_target: int, stays: int) -> list[int]:
    """Round each class's share to whole rows that add up to ``row_target``, or to a few more.

    Classes whose share is below one row are rounded up first if they have more than ``stays``
    inputs.
    """
    shares = [label_class.whole_rows for label_class in classes]
    missing_rows = max(0, row_target - sum(shares))
    candidates = [index for index, label_class in enumerate(classes) if label_class.remainder > 0]

    def urgency(index: int) -> tuple[bool, bool, float]:
        label_class = classes[index]
        return shares[index] > 0, len(label_class.inputs) <= stays, -label_class.remainder

    candidates.sort(key=urgency)
    rare = sum(urgency(index)[:2] == (False, False) for index in candidates)
    rounded_up = max(missing_rows, min(rare, missing_rows + max(1, row_target // GROWTH)))
    for index in candidates[:rounded_up]:
        shares[index] += 1
    return shares


def _nearest(inputs: Sequence[str], sizes: Mapping[str, int], row_target: int) -> list[str]:
    """Choose some of the inputs, but not all, so that about ``row_target`` rows are held out.

    At least one input is chosen if there are several.
    """
    chosen: list[str] = []
    count = 0
    for text in inputs:
        if count >= row_target or len(chosen) + 1 >= len(inputs):
            break
        if abs(count + sizes[text] - row_target) <= row_target - count:
            chosen.append(text)
            count += sizes[text]
    if not chosen and len(inputs) > 1:
        chosen = [min(inputs, key=lambda text: sizes[text])]
    return chosen
