"""Reading of local files into rows, with cells unchanged.

Cells of CSV and TSV files are texts; those of other formats keep their types.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.csv_table import Dialect, distinct_names, read_csv
from orchestrator.data.json_table import read_json
from orchestrator.data.source_row import SourceRow
from orchestrator.data.text_files import COMPRESSIONS, TextFile, compression_of, open_binary
from orchestrator.errors import BadInput
from orchestrator.job.spec import CsvSpec
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".ndjson": "json",
}
SUFFIXES = f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)} behind it"
CSV_REMEDY = (
    "set data.csv.encoding, for instance to latin-1 or cp1252, or convert the file to UTF-8"
)
JSON_REMEDY = "convert the file to UTF-8, for instance with iconv -f latin1 -t utf-8"


@dataclass(frozen=True)
class Table:
    """The rows of one file, and notes to the user on how they were read."""

    rows: list[SourceRow]
    columns: list[str]
    dialect: Dialect | None = None
    """The format of a CSV or TSV file; None for other files."""
    notes: tuple[str, ...] = ()
    """Decisions that the user may not expect, each a sentence with a remedy."""


def table_suffix(file: Path) -> str:
    """Return the suffix that tells how to read a file, as .csv or .csv.gz; empty for no table."""
    return _format_suffix(file) + compression_of(file) if _format_suffix(file) else ""


def _format_suffix(file: Path) -> str:
    """Return the suffix of a table format, without the compression's; empty if there is none."""
    suffix = Path(file.stem if compression_of(file) else file).suffix.lower()
    return suffix if suffix in FORMATS else ""


def read_table(file: Path, where: str, options: CsvSpec | None = None) -> Table:
    """Read all rows of a file, in the format given by its name.

    ``where`` is the key or flag that names the file, for messages. ``options`` apply to CSV and
    TSV. Raises BadInput for a file that can't be read, with the line at fault if there is one.
    """
    file = file.expanduser()
    if not file.is_file():
        raise BadInput(
            f"{where}: the file {file} does not exist (looked in {Path.cwd()})", "correct the path"
        )
    suffix = _format_suffix(file)
    if not suffix:
        raise BadInput(f"{where}: can't tell the format of {file}", f"use one of {SUFFIXES}")
    if not file.stat().st_size:
        return Table([], [])
    try:
        # All rows are in use, so searching them for garbage again and again finds nothing.
        with uncollected():
            return _read(file, FORMATS[suffix], options or CsvSpec())
    except BadInput as error:
        raise BadInput(f"{where}: {error.message}", error.hint) from None


def _read(file: Path, kind: str, options: CsvSpec) -> Table:
    if kind == "parquet":
        columns, rows = _read_parquet(file)
        return Table(rows, columns)
    if kind == "json":
        columns, rows = read_json(TextFile(file, JSON_REMEDY))
        return Table(rows, columns)
    table = read_csv(TextFile(file, CSV_REMEDY, options.encoding), options, tabs=kind == "tsv")
    return Table(table.rows, table.columns, table.dialect, tuple(table.notes))


def _read_parquet(file: Path) -> tuple[list[str], list[SourceRow]]:
    import pyarrow
    from pyarrow import parquet

    with open_binary(file) as stream:
        # Parquet is read from the end of the file, which is impossible while decompressing it.
        parquet_source = io.BytesIO(stream.read()) if compression_of(file) else str(file)
    try:
        with parquet.ParquetFile(parquet_source) as table:
            columns = distinct_names(table.schema_arrow.names)
            return columns, list(_parquet_rows(table, columns, str(file)))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadInput(
            f"{file} can't be read as parquet: {first_line(error)}", "correct the file"
        ) from None


def _parquet_rows(table: ParquetFile, columns: list[str], source: str) -> Iterator[SourceRow]:
    number = 0
    for batch in table.iter_batches():
        cells = [column.to_pylist() for column in batch.columns]
        for row in zip(*cells, strict=True):
            number += 1
            yield SourceRow(zip(columns, row, strict=True), source=source, number=number)
