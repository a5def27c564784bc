"""Reading of JSON and JSON Lines files.

Values keep the types that they have in the file, independent of other rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from orchestrator.data.source_row import SourceRow
from orchestrator.data.text_files import TextFile
from orchestrator.errors import BadInput

SPACE = re.compile(r"[ \t\r\n]*")
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
NumberedValues = Iterator[tuple[int, Any]]
"""For each value, the line on which it begins (from 1) and the value."""


class _RepeatedKey(ValueError):
    """An object has a key more than once, so it is unclear which value counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"has the key {repeated[:60]!r} more than once in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(text: TextFile) -> tuple[list[str], list[SourceRow]]:
    """Return the columns and rows of a file.

    The file may hold one object per line, an array of objects, or objects one after another. An
    array may also hold only texts, which become the column ``text``. An object whose only value is
    a list of objects stands for that list. A key that a row lacks becomes None. NaN is not JSON,
    but many programs write it; it is read as NaN, which is a missing value. Raises BadInput with
    the line at fault.
    """
    source = str(text)
    rows: list[SourceRow] = []
    for number, (line, value) in enumerate(_values(text), start=1):
        if not isinstance(value, dict):
            _refuse(text, line, f"(row {number}) holds {_kind(value)}, not an object")
        rows.append(SourceRow(value, source=source, number=number, line=line))
    return _fill_up(rows), rows


def _fill_up(rows: list[SourceRow]) -> list[str]:
    """Give every row the keys of all rows, with None for those it lacks, and return the keys."""
    columns: dict[str, None] = {}
    for row in rows:
        if row.keys() - columns.keys():
            columns.update(dict.fromkeys(row))
    for row in rows:
        if len(row) < len(columns):
            for column in columns:
                row.setdefault(column, None)
    return list(columns)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# Values


def _values(text: TextFile) -> NumberedValues:
    if _is_json_lines(text):
        for number, line in enumerate(text.lines(), start=1):
            if line.strip():
                yield number, _parse(text, line, number)
    else:
        yield from _of_document(text)


def _is_json_lines(text: TextFile) -> bool:
    """Tell whether the first line that is not blank is a whole value, and others follow.

    An array or an object that is the file's only line is read as a document.
    """
    lines = (line for line in text.lines() if line.strip())
    first, more = next(lines, "").strip(), next(lines, None) is not None
    if not more:
        return not first.startswith(("[", "{"))
    try:
        DECODER.decode(first)
    except (json.JSONDecodeError, RecursionError):
        return False
    except ValueError:  # the value is complete but has another fault
        return True
    return True


def _of_document(text: TextFile) -> NumberedValues:
    """Yield the items of an array, or one value after another."""
    document = _JsonText(text)
    if document.next_character() == "[":
        values = list(document.items())
        document.refuse_more()
        if values and all(isinstance(value, str) for _, value in values):
            values = [(line, {"text": value}) for line, value in values]
        yield from values
        return
    values = list(document.values())
    yield from _only_list(values)


def _only_list(values: list[tuple[int, Any]]) -> NumberedValues:
    """Replace a single object whose only value is a list of objects by those objects.

    A list of messages is the value of a single row.
    """
    if len(values) == 1 and isinstance(values[0][1], dict) and len(values[0][1]) == 1:
        line, items = values[0][0], next(iter(values[0][1].values()))
        if isinstance(items, list) and items and all(map(_is_row, items)):
            return ((line, item) for item in items)
    return iter(values)


def _is_row(item: Any) -> bool:
    """Tell whether an item of a list may be a row: an object, and not a message of a chat."""
    return isinstance(item, dict) and not any(keys <= item.keys() for keys in MESSAGE_KEYS)


class _JsonText:
    """A whole text and the position up to which it has been read."""

    def __init__(self, text: TextFile) -> None:
        self._file = text
        self._text = text.text()
        self._place = 0
        self._counted, self._lines = 0, 1

    def next_character(self) -> str:
        """Skip white space and return the next character, or an empty text at the end."""
        match = SPACE.match(self._text, self._place)
        self._place = match.end() if match else self._place
        return self._text[self._place : self._place + 1]

    def values(self) -> NumberedValues:
        """Yield values that stand one after another."""
        while self.next_character():
            yield self._value()

    def items(self) -> NumberedValues:
        """Yield the items of an array."""
        self._place += 1
        if self.next_character() == "]":
            self._place += 1
            return
        while True:
            self.next_character()
            yield self._value()
            separator = self.next_character()
            if separator not in (",", "]"):
                actual = repr(separator) if separator else "nothing"
                _refuse(
                    self._file, self._line(self._place), f"has {actual} where ',' or ']' belongs"
                )
            self._place += 1
            if separator == "]":
                return

    def refuse_more(self) -> None:
        """Refuse any text after the array."""
        if self.next_character():
            _refuse(
                self._file, self._line(self._place), "has more text behind the end of the array"
            )

    def _value(self) -> tuple[int, Any]:
        line = self._line(self._place)
        try:
            value, self._place = DECODER.raw_decode(self._text, self._place)
        except json.JSONDecodeError as error:
            end = self._line(error.pos)
            beginning = f" (the value begins in line {line})" if end != line else ""
            _refuse(self._file, end, f"can't be read as JSON: {error.msg}{beginning}")
        except (ValueError, RecursionError) as error:
            _refuse(self._file, line, _fault(error))
        _refuse_half_characters(self._file, line, value)
        return line, value

    def _line(self, position: int) -> int:
        """Return the line of a position, counting from the position of the previous call."""
        self._lines += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._lines


def _parse(text: TextFile, line: str, number: int) -> Any:
    try:
        value = DECODER.decode(line)
    except json.JSONDecodeError as error:
        _refuse(text, number, f"can't be read as JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        _refuse(text, number, _fault(error))
    if "\\u" in line:
        _refuse_half_characters(text, number, value)
    return value


def _fault(error: Exception) -> str:
    if isinstance(error, _RepeatedKey):
        return str(error)
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"can't be read as JSON: {str(error).split(';')[0]}"


def _refuse_half_characters(text: TextFile, line: int, value: Any) -> None:
    """Refuse texts with half of a surrogate pair, which tokenizers do not accept."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        _refuse(
            text, line, f"has half of a surrogate pair, \\u{ord(half):04x}, which is no character"
        )


def _refuse(text: TextFile, line: int, fault: str) -> NoReturn:
    raise BadInput(f"{text}:{line} {fault}", "correct this line, or leave it out")
