"""Tables as aligned columns of text, and metrics as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.registry import printable


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Align the cells in columns as wide as their content; unprintable characters are escaped."""
    cells = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def aligned(facts: Sequence[tuple[str, Any]]) -> list[str]:
    """Write each value after its name, in two columns; unprintable characters are escaped."""
    width = max(len(name) for name, _ in facts)
    return [f"{name.ljust(width)}  {printable(str(value))}" for name, value in facts]


def metric_text(metrics: Mapping[str, Any] | None, split: str = "test", every: bool = False) -> str:
    """Format a split's metrics, for example as accuracy 0.970, loss 0.081.

    The test split has more metrics than others: those that validation lacks are shown with
    ``every``. Values that are no numbers are left out: tags in the registry can be edited.
    """
    found, validated = ((metrics or {}).get(name) for name in (split, "validation"))
    numbers = found.items() if isinstance(found, dict) else ()
    usual = validated if isinstance(validated, dict) and not every else dict(numbers)
    return ", ".join(
        f"{name} {value:.3f}"
        for name, value in numbers
        if name in usual and isinstance(value, int | float)
    )
