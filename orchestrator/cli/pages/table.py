"""Columns of text, and figures in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.registry import printable

BASELINES = {
    "zero_shot": "without a prompt",
    "few_shot": "a few examples",
    "instruction": "written instruction",
}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns, as wide as their content; a registry's texts are shown escaped."""
    cells = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def metric_text(metrics: Mapping[str, Any] | None, split: str = "test") -> str:
    """accuracy 0.970, exact_match 0.970, loss 0.081; what somebody put there that is no number is left out."""
    found = (metrics or {}).get(split)
    numbers = found.items() if isinstance(found, dict) else ()
    return ", ".join(
        f"{name} {value:.3f}" for name, value in numbers if isinstance(value, int | float)
    )
