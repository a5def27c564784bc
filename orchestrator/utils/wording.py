"""Wording that several pages share."""

from __future__ import annotations

BASELINE_NAMES = {
    "zero_shot": "without a prompt",
    "few_shot": "a few examples",
    "instruction": "written instruction",
}


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun, ``1 trial`` or ``2 trials``.

    ``plural`` is for a noun whose plural is not formed with an s.
    """
    several = plural or f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"
