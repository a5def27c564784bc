"""The input of a prompt as one text with its virtual tokens, for other engines.

This project joins virtual tokens and the ids of separate texts. Other engines tokenise one text, in
which a virtual token is a word such as ``<sms-spam:0>``. ``fitting_layout`` finds the text that
they read as the same ids, and tries it on example texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data.encoding import Encoder
from orchestrator.data.source_row import Row
from orchestrator.data.template import Mark
from orchestrator.models.placeholders import placed, shares

EXAMPLES = (
    "Is this message spam?",
    "a",
    "FREE entry: call 0800-1234 now!!",
    "Zwei Zeilen,\nein Ümlaut und 3 Wörter",
)


@dataclass(frozen=True)
class Column:
    """A place for the text of a row's column."""

    name: str


@dataclass(frozen=True)
class Virtual:
    """A place for ``count`` virtual tokens of a prompt, from number ``first`` on."""

    first: int
    count: int


Part = str | Column | Virtual


@dataclass(frozen=True)
class Layout:
    """The parts of an input, in order."""

    parts: tuple[Part, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        names = (part.name for part in self.parts if isinstance(part, Column))
        return tuple(dict.fromkeys(names))

    def text(self, tokens: Sequence[str], row: Mapping[str, str]) -> str:
        """Return the text of a row's input, in which virtual tokens are written as ``tokens``."""
        return "".join(
            row[part.name] if isinstance(part, Column) else literal(part, tokens)
            for part in self.parts
        )

    def pattern(self, tokens: Sequence[str]) -> str:
        """Return the text with {column} for each column; its own braces are doubled."""
        return "".join(
            f"{{{part.name}}}"
            if isinstance(part, Column)
            else literal(part, tokens).replace("{", "{{").replace("}", "}}")
            for part in self.parts
        )


def literal(part: str | Virtual, tokens: Sequence[str]) -> str:
    """Return the text of a part that is the same for every row."""
    if isinstance(part, str):
        return part
    return "".join(tokens[part.first : part.first + part.count])


def token_names(name: str, count: int) -> list[str]:
    """Return the words that stand for the virtual tokens of a registered prompt."""
    return [f"{opening(name)}{number}>" for number in range(count)]


def opening(name: str) -> str:
    """Return the beginning that the virtual tokens of a registered prompt share."""
    return f"<{name}:"


def parts_of(
    segments: Sequence[str | Mark], columns: Mapping[str, str], count: int
) -> tuple[Part, ...]:
    """Return an input's segments as parts; ``columns`` are the column names by placeholder."""
    groups = sum(isinstance(segment, Mark) for segment in segments)
    counts = iter(shares(count, groups) if groups else [])
    parts: list[Part] = []
    first = 0
    for segment in segments:
        if isinstance(segment, Mark):
            parts.append(Virtual(first, size := next(counts)))
            first += size
        elif segment in columns:
            parts.append(Column(columns[segment]))
        elif parts and isinstance(last := parts[-1], str):
            parts[-1] = last + str(segment)
        elif segment:
            parts.append(str(segment))
    return tuple(parts)


def placeholders(encoder: Encoder) -> dict[str, str]:
    """Return a text for each column of the template that stands for the column's own text."""
    return {f"@column:{column}@": column for column in encoder.template.columns}


def fitting_layout(
    encoder: Encoder, virtual_ids: Sequence[int], read: Callable[[Layout, Row], list[int]]
) -> Layout | None:
    """Return the layout that ``read`` turns into the encoder's ids, for every example text.

    Tokenizers differ in what they do to a text behind an added token: some put a space in front of
    it as at the start, others do not. None means that no layout fits.
    """
    rows = [dict.fromkeys(encoder.template.columns, example) for example in EXAMPLES]
    expected = [expected_ids(encoder, encoder.row_ids(row), virtual_ids) for row in rows]
    for layout in _candidates(encoder, len(virtual_ids)):
        if all(read(layout, row) == ids for row, ids in zip(rows, expected, strict=True)):
            return layout
    return None


def expected_ids(encoder: Encoder, ids: Sequence[int], virtual_ids: Sequence[int]) -> list[int]:
    """Return the ids of an encoded input with a prompt's virtual tokens in their places."""
    row = placed(ids, len(virtual_ids))
    in_front = [] if encoder.template.places_virtual_tokens else virtual_ids
    return [*in_front, *(virtual_ids[-entry - 1] if entry < 0 else entry for entry in row)]


def _candidates(encoder: Encoder, count: int) -> Iterator[Layout]:
    columns = placeholders(encoder)
    row = {column: placeholder for placeholder, column in columns.items()}
    parts = parts_of(encoder.segments(row), columns, count)
    in_front = () if encoder.template.places_virtual_tokens else (Virtual(0, count),)
    special = "".join(encoder.tokenizer.convert_ids_to_tokens(list(encoder.front_ids)))
    for start in dict.fromkeys([special, ""]):
        for space in ("", " "):
            yield Layout(tuple(part for part in (*in_front, start + space, *parts) if part))
