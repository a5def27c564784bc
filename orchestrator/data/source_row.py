"""Rows of a data set that remember where they were read, so that messages can name the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from orchestrator.errors import BadInput

Row: TypeAlias = Mapping[str, Any]
"""The cells of a row by column, as a table, a request or a test gives them."""


class SourceRow(dict[str, Any]):
    """A row's cells by column, with the place that they were read from.

    A ``SourceRow`` is equal to a plain dict of its cells, and JSON writes both alike.
    """

    __slots__ = ("line", "number", "source")

    def __init__(
        self, cells: Any = (), *, source: str = "", number: int = 0, line: int | None = None
    ) -> None:
        """Create a row.

        ``source`` is the file or data set. ``number`` is the number of the row, from 1. ``line`` is
        the line of the file on which the row begins, from 1, or None for a format without lines.
        """
        super().__init__(cells)
        self.source = source
        self.number = number
        self.line = line

    def with_cells(self, cells: Any) -> SourceRow:
        """Return a row with other cells and the same place."""
        return SourceRow(cells, source=self.source, number=self.number, line=self.line)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (dict(self), self.source, self.number, self.line)


def _restore(cells: dict[str, Any], source: str, number: int, line: int | None) -> SourceRow:
    return SourceRow(cells, source=source, number=number, line=line)


def place_of(row: Any, split: str = "") -> str:
    """Name a row's place for a message: ``train.csv:18 (row 17)``, or ``row 17 of train``.

    ``split`` is used if the row does not know its source.
    """
    source, number = getattr(row, "source", ""), getattr(row, "number", 0)
    line = getattr(row, "line", None)
    if source and line:
        return f"{source}:{line} (row {number})"
    if number:
        return f"row {number} of {source or split}"
    return f"a row of {source or split or 'the data'}"


def at_row(error: BadInput, row: Any) -> BadInput:
    """Put a row's place in front of an error's message, if the row knows where it was read."""
    if not getattr(row, "number", 0):
        return error
    return BadInput(f"{place_of(row)}: {error.message}", error.hint)
