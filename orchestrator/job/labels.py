"""Match labels by meaning: 1, 1.0 and "1" are one label, and so are true and "true"."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from orchestrator.errors import BadInput

Label: TypeAlias = int | float | bool | str
LabelKey: TypeAlias = tuple[str, Hashable]

TRUTH, NUMBER, TEXT, MISSING = "truth", "number", "text", "missing"
"""Kinds of labels: the first part of a label's key."""
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NUMBER_STARTS = frozenset("-0123456789")


def label_key(cell: Any) -> LabelKey:
    """Return a label's meaning; two cells with equal keys are the same label.

    Numbers count by their value. A text counts as the number or truth value that it spells, but
    only in the usual spelling: "1", "1.5" and "true" do, "007", "+1" and "1.50" are texts. A truth
    value is never a number. Raises BadInput for lists, objects and bytes, which can't be labels.
    """
    if isinstance(cell, str):
        return _text_key(cell)
    value = _plain(cell)
    if isinstance(value, bool):
        return TRUTH, value
    if isinstance(value, int | float | Decimal):
        return _number_key(value)
    if value is None:
        return MISSING, None
    if isinstance(value, str):
        return _text_key(value)
    raise BadInput(
        f"the target column holds lists or objects, which can't be labels: {str(cell)[:60]!r}",
        "correct data.target",
    )


def label_text(label: Label) -> str:
    """Write a label as the key of a JSON object: 0 is "0", True is "true", a text is itself."""
    return label if isinstance(label, str) else json.dumps(label)


def spelled(label: Any) -> str:
    """Write a label as it stands in a job file: texts in quotes, anything else without quotes."""
    return json.dumps(label, ensure_ascii=False, default=str)


def by_meaning(labels: Iterable[Label]) -> dict[LabelKey, Label]:
    """Return the labels by their keys; the first label wins among those that mean the same."""
    label_of: dict[LabelKey, Label] = {}
    for label in labels:
        label_of.setdefault(label_key(label), label)
    return label_of


def contradictions(texts: Mapping[Label, str]) -> Iterator[str]:
    """Describe each pair of labels that mean the same but have different texts."""
    label_of = by_meaning(texts)
    for label, text in texts.items():
        first_label = label_of[label_key(label)]
        if texts[first_label] != text:
            yield (
                f"{spelled(first_label)} and {spelled(label)} are the same label, "
                f"with the texts {texts[first_label]!r} and {text!r}"
            )


def _plain(cell: Any) -> Any:
    """Convert numpy and Arrow scalars to Python values, and dates and the like to text."""
    for convert in ("tolist", "as_py"):
        if hasattr(cell, convert):
            cell = getattr(cell, convert)()
    if hasattr(cell, "isoformat"):
        return cell.isoformat()
    return int(cell) if not isinstance(cell, bool) and hasattr(cell, "__index__") else cell


def _text_key(text: str) -> LabelKey:
    if text in TRUTHS:
        return TRUTH, TRUTHS[text]
    if text[:1] in NUMBER_STARTS:
        number = _spelled_number(text)
        if number is not None:
            return _number_key(number)
    return TEXT, str(text)


def _spelled_number(text: str) -> int | float | None:
    """Return the number that a text spells, or None unless the text is its usual spelling."""
    try:
        integer = int(text)
        if str(integer) == text:
            return integer
    except ValueError:  # also raised for thousands of digits, which Python refuses to convert
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and repr(value) == text else None


def _number_key(value: int | float | Decimal) -> LabelKey:
    if math.isnan(value):  # NaN stands for a missing value
        return MISSING, None
    if isinstance(value, int) or not math.isfinite(value):
        return NUMBER, value
    return NUMBER, int(value) if value == int(value) else float(value)
