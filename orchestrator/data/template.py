"""The template, which turns a row into input text, and the verbalizer, which writes out labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.data.cells import cell_text
from orchestrator.data.control_tokens import TemplateText
from orchestrator.data.source_row import Row
from orchestrator.errors import BadInput
from orchestrator.job.labels import Label, LabelKey, by_meaning, contradictions, label_key, spelled
from orchestrator.job.spec import BLANK, FIELD, VIRTUAL, template_columns
from orchestrator.models.tokenizer import Tokenizer


def target_text(cell: Any) -> str:
    """Return the text of a target column's cell; for a list of texts, the first of them."""
    if isinstance(cell, list):
        return cell_text(cell[0]) if cell else ""
    return cell_text(cell)


@dataclass(frozen=True)
class Mark:
    """A place in a filled template that is not text: virtual tokens ({*}) or the blank ({_})."""

    name: str

    @property
    def is_blank(self) -> bool:
        return self.name == BLANK


@dataclass(frozen=True)
class Template:
    """An input text with the row's columns in braces.

    Doubled braces stand for single ones. {*} and {_} are marks.
    """

    text: str
    convert: Callable[[Any], str] = cell_text
    """The function that turns a cell into text."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(template_columns(self.text)))

    @cached_property
    def places_virtual_tokens(self) -> bool:
        """True if the template itself says where virtual tokens stand."""
        return any(piece == VIRTUAL for kind, piece in self._pieces if kind == "mark")

    @cached_property
    def has_blank(self) -> bool:
        return ("mark", BLANK) in self._pieces

    @cached_property
    def _pieces(self) -> tuple[tuple[str, str], ...]:
        """Literal texts, columns and marks in order, as pairs of kind and content."""
        pieces: list[tuple[str, str]] = []
        end = 0
        for match in FIELD.finditer(self.text):
            pieces.append(("text", self.text[end : match.start()]))
            name, end = match.group(1), match.end()
            if name is None:
                pieces.append(("text", match.group(0)[0]))
            else:
                pieces.append(("mark" if name in (VIRTUAL, BLANK) else "column", name))
        return tuple(
            piece for piece in [*pieces, ("text", self.text[end:])] if piece != ("text", "")
        )

    def parts(self, row: Row) -> list[str | Mark]:
        """Fill the template with a row and return its own texts, the row's texts and the marks.

        The template's own texts are ``TemplateText``. Raises BadInput for a column that the row
        lacks.
        """
        parts: list[str | Mark] = []
        for kind, piece in self._pieces:
            if kind == "mark":
                parts.append(Mark(piece))
            else:
                parts.append(TemplateText(piece) if kind == "text" else self._cell(row, piece))
        return parts

    def segments(self, row: Row) -> list[str | Mark]:
        """Fill the template with a row and return the texts and the marks between them.

        Raises BadInput for a column that the row lacks.
        """
        segments: list[str | Mark] = []
        for part in self.parts(row):
            if isinstance(part, str) and segments and isinstance(segments[-1], str):
                segments[-1] += part
            else:
                segments.append(part if isinstance(part, Mark) else str(part))
        return segments

    def fill(self, row: Row) -> str:
        """Return the row's input text without marks.

        Raises BadInput for a column that the row lacks.
        """
        return "".join(segment for segment in self.segments(row) if isinstance(segment, str))

    def texts(self, row: Row) -> dict[str, str]:
        """Return the template's columns of a row as texts.

        Raises BadInput for a column that the row lacks.
        """
        return {column: self._cell(row, column) for column in self.columns}

    def _cell(self, row: Row, column: str) -> str:
        if column not in row:
            raise BadInput(
                f"the template names column {column!r}, the row has {sorted(row)}",
                "correct data.template, or map the column with data.rename",
            )
        try:
            return self.convert(row[column])
        except BadInput as error:
            raise BadInput(f"column {column!r}: {error.message}", error.hint) from None

    def row(self, value: str | Row) -> Row:
        """Turn a served input into a row: a bare text fills the template's only column.

        Raises BadInput for a bare text when the template has several columns or none.
        """
        if not isinstance(value, str):
            return value
        if len(self.columns) != 1:
            raise BadInput(
                f"a bare text can't fill the columns {list(self.columns)}",
                "send an object with a value for each column",
            )
        return {self.columns[0]: value}

    @cached_property
    def tail(self) -> str:
        """The literal text between the answer and the column or mark before it.

        Answers are tokenised as they would be after this text.
        """
        before: list[str] = []
        for kind, piece in self._pieces:
            if (kind, piece) == ("mark", BLANK):
                break
            if kind == "text":
                before.append(piece)
            else:
                before.clear()
        return "".join(before)


@dataclass(frozen=True)
class Verbalizer:
    """The labels and the texts that stand for them.

    ``labels[i]`` is written as ``texts[i]``. The texts are distinct.
    """

    labels: tuple[Label, ...]
    texts: tuple[str, ...]

    @classmethod
    def covering(cls, mapping: Mapping[Label, str], labels: Iterable[Any]) -> Verbalizer:
        """Select the entries that the data needs, in the spec's order.

        Labels are matched by meaning and keep the spec's spelling. Keys that no row has are left
        out, so that one spec may name the labels of several sources. Raises BadInput for labels
        without a text, for labels that share a text, and for keys that mean the same label but have
        different texts.
        """
        if conflict := next(contradictions(mapping), None):
            raise BadInput(f"data.verbalizer: {conflict}", "keep one of them")
        seen_labels = {label_key(label): label for label in labels}
        keyed = by_meaning(mapping)
        missing = sorted((label for key, label in seen_labels.items() if key not in keyed), key=str)
        if missing:
            raise BadInput(
                f"data.verbalizer does not cover label {', '.join(map(repr, missing[:5]))} "
                f"of the data; it has {list(mapping)}",
                _uncovered_hint(missing, keyed),
            )
        used_labels = [label for key, label in keyed.items() if key in seen_labels]
        texts = [mapping[label] for label in used_labels]
        for text in texts:
            if texts.count(text) > 1:
                sharing = [label for label in used_labels if mapping[label] == text]
                raise BadInput(
                    f"data.verbalizer gives labels {sharing} the same text {text!r}",
                    "make the texts distinct",
                )
        return cls(tuple(used_labels), tuple(texts))

    def index(self, label: Any) -> int:
        return self._places[label_key(label)]

    @cached_property
    def _places(self) -> dict[LabelKey, int]:
        return {label_key(label): index for index, label in enumerate(self.labels)}


def _uncovered_hint(missing: Iterable[Any], keyed: Mapping[LabelKey, Label]) -> str:
    """Say how to cover the missing labels.

    A label that is text but looks like a number must be quoted in YAML.
    """
    for label in missing:
        if isinstance(label, str) and _as_number(label) in keyed:
            return f"write the key as the data has it, in quotes: {spelled(label)}"
    return "add a text for each label, or correct data.target"


def _as_number(text: str) -> LabelKey | None:
    try:
        return label_key(float(text))
    except (ValueError, OverflowError):
        return None


def continuation_ids(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Return the token ids that ``text`` has when it follows ``before``.

    Both are tokenised together and then cut. A label tokenised on its own would have other tokens:
    a SentencePiece tokenizer puts a space in front of it.
    """
    anchor = before or "a"
    head = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    joined_ids = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if joined_ids[: len(head)] == head and len(joined_ids) > len(head):
        return list(joined_ids[len(head) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
