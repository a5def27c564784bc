"""The conversion of cells into text, the same for training, evaluation and serving."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import BadInput

MAX_DEPTH = 100  # of nested lists and objects; JSON readers stop at a few hundred
HINT = "write it as text, a number, true or false, a list or an object"
NUMPY_DATE, NUMPY_DURATION = "M", "m"


def is_missing(cell: Any) -> bool:
    """Tell whether a cell holds no value: None, or a data frame's NaN, NaT or NA."""
    if cell is None or isinstance(cell, str):
        return cell is None
    if isinstance(cell, float | decimal.Decimal):
        return math.isnan(cell)
    kind = type(cell)
    if kind.__name__ in ("NAType", "NaTType"):
        return kind.__module__.startswith("pandas.")
    if kind.__module__ == "numpy" and kind.__name__ in ("float16", "float32", "datetime64"):
        return str(cell) in ("nan", "NaT")
    return False


def cell_text(cell: Any) -> str:
    """Return a cell as text.

    A text is returned unchanged. Numbers, booleans, lists and objects are written as JSON (``1.5``,
    ``true``), dates in ISO 8601. A missing cell is the empty text; callers that refuse missing
    input check ``is_missing`` first. Raises BadInput for bytes and other objects, and for values
    that JSON can't hold: infinite numbers, NaN inside a list, half of a surrogate pair.
    """
    if not isinstance(cell, str) and is_missing(cell):
        return ""
    text = cell if isinstance(cell, str) else _json_text(_plain(cell))
    if not text.isascii():
        _check_characters(text)
    return text


def early_cell_text(cell: Any) -> str:
    """Return a cell as the text that was used to tune prompts before ``cell_text`` existed."""
    return "" if cell is None else str(cell)


def is_blank(text: str) -> bool:
    """Tell whether a text is empty or only white space."""
    return not text or text.isspace()


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"a cell holds half a character, U+{ord(text[error.start]):04X}, which is no text",
            "write the whole character",
        ) from None


def _plain(cell: Any, depth: int = 0) -> Any:
    """Convert a cell to JSON's types, including values of date types, numpy, torch and Arrow."""
    if cell is None or isinstance(cell, str | int):
        return cell
    if isinstance(cell, float):
        return _finite(float(cell))
    if isinstance(cell, Mapping | list | tuple):
        return _nested(cell, depth)
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return _date_text(cell)
    if isinstance(cell, decimal.Decimal):
        return format(_finite(cell), "f")
    if isinstance(cell, uuid.UUID):
        return str(cell)
    return _library_value(cell, depth)


def _nested(cell: Mapping[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
    if depth == MAX_DEPTH:
        raise BadInput(
            f"a cell holds more than {MAX_DEPTH} lists and objects inside each other", HINT
        )
    if not isinstance(cell, Mapping):
        return [_plain(value, depth + 1) for value in cell]
    for key in cell:
        if not isinstance(key, str):
            raise BadInput(f"a cell holds an object with the key {key!r}, and keys are texts", HINT)
    return {key: _plain(value, depth + 1) for key, value in cell.items()}


def _finite(number: Any) -> Any:
    if not math.isfinite(number):
        raise BadInput(f"a cell holds {number}, which is not a finite number", HINT)
    return number


def _date_text(date: Any) -> str:
    if is_missing(date):  # pandas' NaT inside a list is a datetime
        raise BadInput("a cell holds NaT, which is no date", HINT)
    return str(date.isoformat())


def _library_value(cell: Any, depth: int) -> Any:
    """Convert a value of numpy, torch or Arrow to Python's types.

    Raises BadInput for any other type.
    """
    library = type(cell).__module__.partition(".")[0]
    if library == "pyarrow" and hasattr(cell, "as_py"):
        return _plain(cell.as_py(), depth)
    if library in ("numpy", "torch") and hasattr(cell, "tolist"):
        kind = getattr(getattr(cell, "dtype", None), "kind", "")
        if kind in (NUMPY_DATE, NUMPY_DURATION):
            return _numpy_dates(cell, kind, depth)
        return _plain(cell.tolist(), depth)
    raise BadInput(
        f"a cell holds {type(cell).__name__}, which has no text: {str(cell)[:60]!r}", HINT
    )


def _numpy_dates(cell: Any, kind: str, depth: int) -> Any:
    """Convert numpy's dates to ISO texts.

    ``tolist`` would turn dates with nanoseconds into numbers.
    """
    if kind == NUMPY_DURATION:
        raise BadInput(f"a cell holds a duration, {str(cell)[:60]}, which has no text", HINT)
    if cell.ndim:
        return [_numpy_dates(value, kind, depth + 1) for value in cell]
    date = cell.tolist()
    if date is None:
        raise BadInput("a cell holds NaT, which is no date", HINT)
    if not isinstance(date, int):
        return date.isoformat()
    microseconds = cell.astype("datetime64[us]")
    return microseconds.tolist().isoformat() if microseconds == cell else str(cell)
