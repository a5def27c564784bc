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
    wanted = max(1, round(fraction * len(inputs)))
    classes = _draw(_inputs_by_label(inputs, labels, pool_rare), sizes, fraction, seed)
    shares = _whole_shares(classes, wanted, stays)
    chosen = _choose(classes, shares, sizes)
    if not chosen:  # no class has two inputs
        chosen = _nearest([text for each in classes for text in each.inputs], sizes, wanted)
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
    chosen: list[str] = []
    missing = 0
    for each, count in zip(classes, shares, strict=True):
        if not count:
            continue
        most = count // 2  # limits how much a class makes up for large groups of another
        aim = count + max(-most, min(most, missing))
        taken = _nearest(each.inputs, sizes, aim)
        missing += count - sum(sizes[text] for text in taken)
        chosen += taken
    return chosen


def _whole_shares(classes: Sequence[_Class], wanted: int, stays: int) -> list[int]:
    """Round each class's share to whole rows that add up to ``wanted``, or to a few more.

    Classes whose share is below one row are rounded up first if they have more than ``stays``
    inputs.
    """
    shares = [each.whole_rows for each in classes]
    left = max(0, wanted - sum(shares))
    candidates = [place for place, each in enumerate(classes) if each.remainder > 0]

    def urgency(place: int) -> tuple[bool, bool, float]:
        each = classes[place]
        return shares[place] > 0, len(each.inputs) <= stays, -each.remainder

    candidates.sort(key=urgency)
    rare = sum(urgency(place)[:2] == (False, False) for place in candidates)
    rounded_up = max(left, min(rare, left + max(1, wanted // GROWTH)))
    for place in candidates[:rounded_up]:
        shares[place] += 1
    return shares


def _nearest(inputs: Sequence[str], sizes: Mapping[str, int], wanted: int) -> list[str]:
    """Choose some of the inputs, but not all, so that their rows add up to about ``wanted``.

    At least one input is chosen if there are several.
    """
    chosen: list[str] = []
    count = 0
    for text in inputs:
        if count >= wanted or len(chosen) + 1 >= len(inputs):
            break
        if abs(count + sizes[text] - wanted) <= wanted - count:
            chosen.append(text)
            count += sizes[text]
    if not chosen and len(inputs) > 1:
        chosen = [min(inputs, key=lambda text: sizes[text])]
    return chosen
