"""Wording that several pages share."""

from __future__ import annotations

BASELINE_NAMES = {
    "zero_shot": "without a prompt",
    "few_shot": "a few examples",
    "instruction": "written instruction",
}


def counted(number: int, one: str, several: str = "") -> str:
    """Write a count with its noun, ``1 trial`` or ``2 trials``.

    ``several`` is the plural if it is not formed with an s.
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
