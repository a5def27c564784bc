"""Reduction of rows to the columns in use; rows that lack a value are refused, dropped or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.cells import cell_text, is_blank, is_missing
from orchestrator.data.source_row import Row, SourceRow, place_of
from orchestrator.errors import BadInput
from orchestrator.job.labels import Label, LabelKey, by_meaning, label_key
from orchestrator.job.spec import DataSpec


@dataclass
class UsedColumns:
    """The columns that a job reads, and the treatment of rows without a value in them."""

    data: DataSpec
    inputs: Sequence[str]
    """Columns of all templates."""
    more: Sequence[str] = ()
    """Further columns that are needed besides those of the job."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of rows of each split that were left out because an input is empty."""

    def __post_init__(self) -> None:
        self._labels: dict[LabelKey, Label] = by_meaning(self.data.verbalizer or {})
        self._known: set[str] = set()
        references = [self.data.references] if self.data.references else []
        self._others = list(dict.fromkeys([self.data.target, *references, *self.more]))
        self._columns = list(dict.fromkeys([*self.inputs, *self._others]))

    def cut(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return the rows with only the columns in use, and labels as the verbalizer spells them.

        Columns are first renamed. Raises BadInput for a column that no row has, for a row without a
        target, for references that are not texts, for a cell that can't be turned into text, and
        with ``data.empty: refuse`` for a row without an input.
        """
        used_rows: list[Row] = []
        empty: list[tuple[SourceRow, str]] = []
        for number, row in enumerate(rows, start=1):
            source_row = self._source_row(row, number)
            column = self._empty_column(source_row, split)
            if column and column not in source_row:
                self._check_known(column, rows, source_row, split)
            used_row = self._cut_row(source_row, split)
            if column:
                empty.append((used_row, column))
            if not column or self.data.empty == "keep":
                used_rows.append(used_row)
        if empty and self.data.empty == "refuse":
            raise _without_input(empty, split)
        if empty and self.data.empty == "drop":
            self.dropped[split] = len(empty)
        return used_rows

    def _source_row(self, row: Row, number: int) -> SourceRow:
        """Return the row with renamed columns and the place that it was read from."""
        source_row = row if isinstance(row, SourceRow) else SourceRow(row, number=number)
        new_names = {new: row[old] for old, new in self.data.rename.items() if old in row}
        return source_row.with_cells({**source_row, **new_names}) if new_names else source_row

    def _check_known(self, column: str, rows: Sequence[Row], row: SourceRow, split: str) -> None:
        """Refuse a column that no row has: such a column is misspelt rather than empty."""
        if column in self._known:
            return
        old_names = {old for old, new in self.data.rename.items() if new == column}
        names = {column, *old_names}
        if all(names.isdisjoint(any_row) for any_row in rows):
            raise self._lacking(column, row, split)
        self._known.add(column)

    def _cut_row(self, row: SourceRow, split: str) -> SourceRow:
        for column in self._others:
            if column not in row:
                raise self._lacking(column, row, split)
        self._check_target(row, split)
        if self.data.references:
            _check_references(row, self.data.references, split)
        cells = {column: row.get(column) for column in self._columns}
        if self._labels:
            cells[self.data.target] = self._label(row, split)
        return row.with_cells(cells)

    def _label(self, row: SourceRow, split: str) -> Any:
        """Return a label as the verbalizer spells it.

        A label that the verbalizer lacks is returned unchanged; ``Verbalizer`` reports it.
        """
        cell = row[self.data.target]
        try:
            return self._labels.get(label_key(cell), cell)
        except BadInput as error:
            raise BadInput(f"{place_of(row, split)}: {error.message}", error.hint) from None

    def _check_target(self, row: SourceRow, split: str) -> None:
        target = row[self.data.target]
        value = next(iter(target), None) if isinstance(target, list) else target
        if is_missing(value) or (isinstance(value, str) and self._is_no_answer(value)):
            raise BadInput(
                f"{place_of(row, split)} has no value in the target column {self.data.target!r}",
                "fill it in, or leave the row out",
            )

    def _is_no_answer(self, text: str) -> bool:
        if not is_blank(text):
            return False
        return self.data.empty != "keep" and label_key(text) not in self._labels

    def _empty_column(self, row: SourceRow, split: str) -> str:
        """Return the first input column without text; an empty string if every column has text."""
        for column in self.inputs:
            try:
                text = cell_text(row.get(column))
            except BadInput as error:
                location = f"{place_of(row, split)}, column {column!r}"
                raise BadInput(f"{location}: {error.message}", error.hint) from None
            if is_blank(text):
                return column
        return ""

    def _lacking(self, column: str, row: SourceRow, split: str) -> BadInput:
        keys = dict.fromkeys(self.more, "--by")
        keys |= dict.fromkeys(self.inputs, "data.template")
        if self.data.references:
            keys[self.data.references] = "data.references"
        key = {**keys, self.data.target: "data.target"}[column]
        where = place_of(row, split)
        return BadInput(
            f"{key} names column {column!r}, which {where} lacks; it has {sorted(row)}",
            f"correct {key}, or map the column with data.rename",
        )


def _without_input(empty: Sequence[tuple[SourceRow, str]], split: str) -> BadInput:
    """Create the error that names the first row without an input and counts the others."""
    row, column = empty[0]
    rows = "row has" if len(empty) == 2 else "rows have"
    more = f"; {len(empty) - 1} more {rows} none either" if len(empty) > 1 else ""
    return BadInput(
        f"{place_of(row, split)} has no text in column {column!r}, which data.template names{more}",
        "fill it in, or set data.empty (drop leaves such rows out, keep takes an empty text)",
    )


def _check_references(row: SourceRow, column: str, split: str) -> None:
    cell = row[column]
    if is_missing(cell) or (isinstance(cell, str) and is_blank(cell)):
        return
    if not isinstance(cell, list) or not all(isinstance(text, str) for text in cell):
        raise BadInput(
            f"{place_of(row, split)} has {str(cell)[:60]!r} in column {column!r}, which "
            "data.references names; a list of texts belongs there, or nothing",
            "correct data.references; .jsonl and .parquet files can hold lists",
        )
