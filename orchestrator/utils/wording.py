"""Wording of numbers in sentences."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """Write a count with its noun: ``1 trial``, ``2 trials``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
