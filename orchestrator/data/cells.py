"""Turn a cell into text: one conversion for training, evaluation and serving."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from typing import Any

from orchestrator.errors import BadInput


def is_missing(cell: Any) -> bool:
    """Tell whether a cell holds no value: None, or the NaN that stands for it in data frames."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def cell_text(cell: Any) -> str:
    """Return the text that stands for a cell wherever it is read.

    A text stays as it is. Numbers and booleans are written as JSON writes them (``1.5``, ``true``),
    dates in ISO 8601, lists and objects as JSON. A missing cell is the empty text; callers that
    refuse missing input check ``is_missing`` first. Raises BadInput for bytes and other objects.
    """
    if is_missing(cell):
        return ""
    return cell if isinstance(cell, str) else _text(_plain(cell))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(cell: Any) -> Any:
    """Return the cell as JSON's types have it: numpy, Arrow and date types as what they stand for."""
    if isinstance(cell, str | bool | int | float) or cell is None:
        return cell
    if isinstance(cell, dict):
        return {str(key): _plain(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [_plain(value) for value in cell]
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return cell.isoformat()
    if isinstance(cell, decimal.Decimal | uuid.UUID):
        return str(cell)
    if hasattr(cell, "tolist") and type(cell).__module__.partition(".")[0] in ("numpy", "torch"):
        return _plain(cell.tolist())
    raise BadInput(
        f"a cell holds {type(cell).__name__}, which has no text: {str(cell)[:60]!r}",
        "write it as text, a number, a list or an object",
    )
