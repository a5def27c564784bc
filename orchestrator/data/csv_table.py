"""Reading of CSV and TSV files.

Every cell is exactly the text in the file, and rows are never shortened or padded.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from orchestrator.data.source_row import SourceRow
from orchestrator.data.text_files import TextFile
from orchestrator.errors import BadInput
from orchestrator.job.spec import AUTO, CsvSpec

NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", " ": "space"}
OTHER_DELIMITERS = re.compile(r"[;\t|,]")

NumberedCells = Iterator[tuple[int, list[str]]]
"""For each row, the line on which it begins (from 1) and its cells."""


@dataclass(frozen=True)
class Dialect:
    """The format of a CSV or TSV file."""

    delimiter: str
    quoted: bool
    """True if cells may be enclosed in double quotes; otherwise quotes are ordinary characters."""
    encoding: str

    def __str__(self) -> str:
        delimiter = NAMES.get(self.delimiter, repr(self.delimiter))
        quoting = "with quoting" if self.quoted else "without quoting"
        return f"delimiter {delimiter}, {quoting}, {self.encoding}"


@dataclass
class CsvRows:
    """The rows of a CSV or TSV file, with the decisions and notes made while reading it."""

    columns: list[str]
    rows: list[SourceRow]
    dialect: Dialect
    notes: list[str] = field(default_factory=list)


def read_csv(text: TextFile, options: CsvSpec, tabs: bool) -> CsvRows:
    """Read a file with a header.

    ``tabs`` is set if the file's name says TSV. In TSV files quotes are text unless every cell is
    quoted. Raises BadInput with the line of a row that does not fit the header.
    """
    delimiter = options.delimiter
    if delimiter == AUTO:
        delimiter = "\t" if tabs else ","
    fully_quoted = options.quoting == AUTO and tabs and _has_quoted_header(text, delimiter)
    opening_quotes = _OpeningQuotes()
    quoted = fully_quoted or options.quoting == "standard" or (options.quoting == AUTO and not tabs)
    if quoted:
        columns, rows = _rows(text, _quoted_cells(text, delimiter, fully_quoted), delimiter)
    else:
        columns, rows = _rows(text, _plain_cells(text, delimiter, opening_quotes), delimiter)
    table = CsvRows(columns, rows, Dialect(delimiter, quoted, text.used_encoding))
    if options.quoting == AUTO:
        table.notes += opening_quotes.notes(text)
    if len(columns) == 1 and (other_delimiter := OTHER_DELIMITERS.search(columns[0])):
        table.notes.append(
            f"{text}: the header is a single cell, {columns[0][:60]!r}, with "
            f"{NAMES[delimiter] if delimiter in NAMES else repr(delimiter)} as delimiter; "
            f"if {other_delimiter.group()!r} separates the cells, set data.csv.delimiter"
        )
    return table


@dataclass
class _OpeningQuotes:
    """The cells that begin with a quote in a file that is read without quoting.

    The quotes may have been meant to enclose the cells.
    """

    cells: int = 0
    line: int = 0

    def count(self, line: int, cells: Sequence[str]) -> None:
        opening = sum(cell.startswith('"') for cell in cells)
        if opening and not self.cells:
            self.line = line
        self.cells += opening

    def notes(self, text: TextFile) -> list[str]:
        if not self.cells:
            return []
        number = "1 cell begins" if self.cells == 1 else f"{self.cells:,} cells begin"
        return [
            f"{text} is read without quoting, as not every cell of it is quoted: "
            f"{number} with a quote, the first in line {self.line}, and the quotes stay in "
            "the text; if they enclose cells, set data.csv.quoting: standard"
        ]


# Cells


def _plain_cells(text: TextFile, delimiter: str, opening_quotes: _OpeningQuotes) -> NumberedCells:
    """Split every line at the delimiter, skipping blank lines."""
    for number, line in enumerate(text.lines(), start=1):
        content = line.removesuffix("\n").removesuffix("\r")
        if not content:
            continue
        if "\r" in content:
            _refuse_row(text, number, "has a carriage return in the middle", "remove it")
        cells = content.split(delimiter)
        if '"' in content:
            opening_quotes.count(number, cells)
        yield number, cells


def _quoted_cells(text: TextFile, delimiter: str, all_quoted: bool) -> NumberedCells:
    """Parse cells that may be quoted, or that must be unless they are empty (``all_quoted``)."""
    csv.field_size_limit(sys.maxsize)  # for the whole process, so that cells may have any length
    reader = csv.reader(
        text.lines(),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_NONNUMERIC if all_quoted else csv.QUOTE_MINIMAL,
    )
    start = 1
    try:
        for cells in reader:
            if all_quoted and not _all_texts(cells):
                raise ValueError("the csv module reads cells without quotes as numbers")
            if cells:  # a blank line gives no cells
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        _refuse_row(
            text,
            start,
            _fault(error),
            'write a quote inside a quoted cell twice (""), and quote cells with line breaks; '
            "where quotes are text, set data.csv.quoting: none",
        )
    except ValueError:
        _refuse_row(
            text,
            start,
            "has a cell without quotes, and all cells of the header are quoted",
            "set data.csv.quoting: standard where quotes enclose cells, none where they are text",
        )


def _fault(error: csv.Error) -> str:
    reason = str(error)
    if reason.startswith("unexpected end"):
        return "begins a quoted cell that never ends"
    if "expected after" in reason:
        return "has text behind the closing quote of a cell"
    if reason.startswith("new-line"):
        return "has a carriage return outside quotes"
    return f"can't be read: {reason}"


def _has_quoted_header(text: TextFile, delimiter: str) -> bool:
    """Tell whether all cells of the first row are quoted."""
    first = next((line for line in text.lines() if line.strip("\r\n")), "")
    if not first.startswith('"'):
        return False
    try:
        next(_quoted_cells(text, delimiter, all_quoted=True))
    except BadInput:
        return False
    return True


def _all_texts(cells: Sequence[object]) -> bool:
    return all(isinstance(cell, str) for cell in cells)


# Rows


def _rows(
    text: TextFile, cells: NumberedCells, delimiter: str
) -> tuple[list[str], list[SourceRow]]:
    """Return the column names and the rows below them."""
    _, header = next(cells, (0, []))
    columns = distinct_names(header)
    source, width = str(text), len(columns)
    rows: list[SourceRow] = []
    for number, (line, row) in enumerate(cells, start=1):
        if len(row) != width:
            _refuse_width(text, line, number, len(row), width, delimiter)
        rows.append(
            SourceRow(zip(columns, row, strict=True), source=source, number=number, line=line)
        )
    return columns, rows


def distinct_names(header: Iterable[str]) -> list[str]:
    """Return the header, with the column number added to names that occur more than once.

    Columns of the same name can't be told apart, so none of them keeps the plain name.
    """
    names = list(header)
    counts = Counter(names)
    return [
        f"{name} (column {number})" if counts[name] > 1 else name
        for number, name in enumerate(names, start=1)
    ]


def _refuse_width(
    text: TextFile, line: int, number: int, cells: int, width: int, delimiter: str
) -> NoReturn:
    counted = "1 cell" if cells == 1 else f"{cells} cells"
    name = NAMES.get(delimiter, repr(delimiter))
    raise BadInput(
        f"{text}:{line} (row {number}) has {counted}, and the header has {width}",
        f"quote cells that hold the delimiter ({name}), or correct the row; the delimiter and the "
        "quoting are set by data.csv",
    )


def _refuse_row(text: TextFile, line: int, fault: str, remedy: str) -> NoReturn:
    raise BadInput(f"{text}:{line}: the row that begins in this line {fault}", remedy)
