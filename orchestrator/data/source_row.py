"""A row of a data set that remembers where it was read, so that messages can say so."""

from __future__ import annotations

from typing import Any


class SourceRow(dict[str, Any]):
    """Cells by column, with the place that they were read from.

    It is equal to, and serialised as, a plain dict of its cells.
    """

    __slots__ = ("line", "number", "source")

    def __init__(
        self, cells: Any = (), *, source: str = "", number: int = 0, line: int | None = None
    ) -> None:
        """``source`` is the file or data set, ``number`` the row's (from 1), ``line`` the file's
        (from 1) on which the row begins; None where the format has no lines."""
        super().__init__(cells)
        self.source = source
        self.number = number
        self.line = line

    def with_cells(self, cells: Any) -> SourceRow:
        """Return other cells at the same place."""
        return SourceRow(cells, source=self.source, number=self.number, line=self.line)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (dict(self), self.source, self.number, self.line)


def _restore(cells: dict[str, Any], source: str, number: int, line: int | None) -> SourceRow:
    return SourceRow(cells, source=source, number=number, line=line)


def place_of(row: Any, split: str = "") -> str:
    """Name a row's place for a message: ``train.csv:18 (row 17)``, or ``row 17 of train``.

    ``split`` is named where the row does not know its source.
    """
    source, number = getattr(row, "source", ""), getattr(row, "number", 0)
    line = getattr(row, "line", None)
    if source and line:
        return f"{source}:{line} (row {number})"
    return (
        f"row {number} of {source or split}"
        if number
        else f"a row of {source or split or 'the data'}"
    )
