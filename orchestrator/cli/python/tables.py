"""Data frames and data sets as the data of a job: each is written once, as a parquet file.

A search reads its data again when it is resumed, perhaps by another process, so what stands in
memory has to stand in a file. The file is named after the digest of its contents.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.data.dataset import class_name, class_names
from orchestrator.errors import BadInput
from orchestrator.search.state.folder import home_folder
from orchestrator.utils.atomic import write_whole
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

    Table: TypeAlias = pandas.DataFrame | datasets.Dataset | pyarrow.Table

REMEDY = "convert the column, for instance with frame.astype({'COLUMN': str})"
DIGITS = 16  # of the digest, in a file's name
ARROW_ERRORS = (ValueError, TypeError, OverflowError, NotImplementedError)


def is_table(value: object) -> bool:
    """Tell whether a value is a data frame of pandas, a ``datasets.Dataset`` or an Arrow table."""
    return _converter(value) is not None


def keep_table(
    table: Table,
    where: str,
    target: str,
    rename: Mapping[str, str],
    labels: Iterable[Any],
) -> Path:
    """Write a table into the folder for state, unless the same rows are there; return the file.

    Cells keep their types, as in any parquet file. The class numbers of a ``datasets.Dataset``
    become names if ``labels`` are names. ``where`` is the key that the table is the value of.
    Raises BadInput for columns that parquet can't hold.
    """
    import pyarrow
    from pyarrow import parquet

    convert = _converter(table)
    assert convert is not None
    stream = pyarrow.BufferOutputStream()
    try:
        rows = _with_class_names(convert(table), table, target, rename, labels)
        # Without metadata and chunks, the same rows give the same bytes.
        parquet.write_table(rows.replace_schema_metadata(None).combine_chunks(), stream)
    except ARROW_ERRORS as error:
        kind = type(table).__name__
        message = f"{where}: the {kind} can't be written as parquet: {first_line(error)}"
        raise BadInput(message, REMEDY) from None
    content = stream.getvalue().to_pybytes()
    return _keep(content, home_folder() / "data", where)


def _keep(content: bytes, folder: Path, where: str) -> Path:
    """Write a file that is named after its contents, unless it exists already."""
    file = folder / f"{hashlib.sha256(content).hexdigest()[:DIGITS]}.parquet"
    try:
        if not file.is_file():
            write_whole(file, content)
    except OSError as error:
        raise BadInput(
            f"{where}: the rows can't be kept in {folder} ({error.strerror})",
            "set ORCHESTRATOR_HOME to a folder that can be written",
        ) from None
    return file


def _converter(value: object) -> Callable[[Any], Any] | None:
    """Return the function that makes an Arrow table of the value; None if there is none."""
    for library, kind, convert in CONVERTERS:
        # A value of a library that nobody has imported can't exist.
        if isinstance(value, getattr(sys.modules.get(library), kind, ())):
            return convert
    return None


def _from_frame(frame: Any) -> Any:
    import pyarrow

    # An index with a name is a column that somebody has made the index.
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    return pyarrow.Table.from_pandas(frame, preserve_index=False)


def _from_dataset(rows: Any) -> Any:
    # Not its table, which also holds rows that select() and filter() have left out.
    return rows.with_format("arrow")[:]


CONVERTERS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("pandas", "DataFrame", _from_frame),
    ("datasets", "Dataset", _from_dataset),
    ("pyarrow", "Table", lambda table: table),
)


def _with_class_names(
    rows: Any, table: Any, target: str, rename: Mapping[str, str], labels: Iterable[Any]
) -> Any:
    found = class_names(getattr(table, "features", None) or {}, target, rename, labels)
    if found is None:
        return rows
    import pyarrow

    column, names = found
    texts = [class_name(number, names) for number in rows[column].to_pylist()]
    place = rows.schema.get_field_index(column)
    return rows.set_column(place, column, pyarrow.array(texts, pyarrow.string()))


def rows_of(inputs: Any) -> list[str | dict[str, Any]]:
    """Return the texts or rows of a list, a series, a data frame or a data set.

    Raises BadInput for a single text, and for an entry that is neither a text nor a row.
    """
    if isinstance(inputs, str | Mapping):
        raise BadInput("the input is a single text or row, not a list of them", "write [input]")
    if is_table(inputs):
        entries = _converted(inputs)
    else:
        try:
            entries = list(inputs)
        except TypeError:
            kind = type(inputs).__name__
            raise BadInput(
                f"the input is a {kind}, not a list of texts or rows", "write [input]"
            ) from None
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, str | Mapping):
            kind = type(entry).__name__
            raise BadInput(
                f"row {number} is a {kind}, neither a text nor a row",
                "give texts, or rows as {column: value}",
            )
    return entries


def _converted(table: Any) -> list[Any]:
    convert = _converter(table)
    assert convert is not None
    try:
        rows: list[Any] = convert(table).to_pylist()
    except ARROW_ERRORS as error:
        kind = type(table).__name__
        raise BadInput(f"the {kind} can't be read: {first_line(error)}", REMEDY) from None
    return rows
