"""Wording that several pages share."""

from __future__ import annotations

BASELINE_NAMES = {
    "zero_shot": "without a prompt",
    "few_shot": "a few examples",
    "instruction": "written instruction",
}


def counted(number: int, noun: str) -> str:
    """Write a count with its noun: ``1 trial``, ``2 trials``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
