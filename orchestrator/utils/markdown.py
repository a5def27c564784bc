"""Markdown that shows texts of users as they are, whatever characters they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

TICKS = re.compile(r"`+")


def quoted(text: str) -> str:
    """Write a text as a JSON string on one line, with its invisible characters escaped."""
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(char) for char in literal)


def _escape(char: str) -> str:
    """Return a character's JSON escapes: one, or two for a character beyond U+FFFF."""
    return json.dumps(char)[1:-1] if not char.isascii() else f"\\u{ord(char):04x}"


def code(value: Any) -> str:
    """Format a value as inline code; white space and invisible characters become single spaces.

    The text can't end its own code span, since the span's ends have more backticks than it has in
    a row.
    """
    text = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    ends = "`" * (_longest(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ends}{padding}{text}{padding}{ends}"


def fenced(text: str, language: str = "") -> str:
    """Format a text as a block of code, which no line of the text can end.

    A text with invisible characters is shown as a JSON string.
    """
    shown = text if text.replace("\n", "").isprintable() else quoted(text)
    fence = "`" * max(3, _longest(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table; the cells are markdown, in which only the separators are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]


def _longest(text: str) -> int:
    return max(map(len, TICKS.findall(text)), default=0)
