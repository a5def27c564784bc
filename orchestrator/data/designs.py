"""Prompt design: a written text in front of rows instead of a learned prompt.

Brown et al. 2020, section 2. A design is a template and some training rows with their answers,
which are written out in front of each input as far as the model's context has room. The rows are
chosen at random, or are the nearest ones of each input (as in Liu et al. 2022, "What makes good
in-context examples for GPT-3?", with words instead of embeddings).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.data.cells import cell_text
from orchestrator.data.control_tokens import WrittenText
from orchestrator.data.dataset import RowSplits
from orchestrator.data.demonstrations import demonstrations, joined, written_out
from orchestrator.data.encoding import Encoded, Encoder, make_encoder, reference_texts
from orchestrator.data.source_row import Row
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import DataSpec
from orchestrator.models.source import Family
from orchestrator.models.tokenizer import Tokenizer

BOUNDARY = 4  # reserve, since joined texts may have more tokens than separate ones
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Design:
    """A written prompt."""

    template: str | None = None
    """The template; None means ``data.template``."""
    shots: int = 0
    """Maximum number of demonstrations."""
    demonstrations: str = "random"
    """How demonstrations are chosen: ``random`` or ``nearest``."""
    seed: int = 0

    @classmethod
    def of(cls, spec: TrialSpec) -> Design:
        return cls(spec.template, spec.shots or 0, spec.demonstrations or "random", spec.seed)


class Designs:
    """A job's rows as each design writes them out.

    ``context`` is the number of tokens in the model's context. ``generated`` is the maximum number
    of tokens in a generated text, or 0 if no texts are generated.
    """

    def __init__(
        self,
        data: DataSpec,
        rows: RowSplits,
        tokenizer: Tokenizer,
        family: Family,
        context: int,
        generated: int = 0,
        table_size: int | None = None,
    ) -> None:
        self._data = data
        self._rows = rows
        self._tokenizer = tokenizer
        self._family: Family = family
        self._context = context
        self._generated = generated
        self._table_size = table_size
        self._encoders: dict[str | None, Encoder] = {}
        self._kept: dict[tuple[Design, str], tuple[Encoded, float]] = {}

    def encoder(self, design: Design) -> Encoder:
        """Return the encoder of a design's template."""
        if design.template not in self._encoders:
            data = self._data.model_copy(
                update={"template": design.template or self._data.template}
            )
            self._encoders[design.template] = make_encoder(
                data, self._rows, self._tokenizer, self._family, self._table_size
            )
        return self._encoders[design.template]

    def encoded(self, design: Design, split: str) -> Encoded:
        """Return the tokenised rows of a split, each with its demonstrations in front."""
        return self._made(design, split)[0]

    def shown(self, design: Design, split: str) -> float:
        """Return the average number of demonstrations in front of a row."""
        return self._made(design, split)[1]

    def text(self, design: Design) -> str:
        """Return the text in front of every row.

        The text is empty with ``nearest``, where each row has its own demonstrations.
        """
        return self._random(design)[0] if design.shots and design.demonstrations == "random" else ""

    def fits(self, design: Design) -> bool:
        """Tell whether the context has room for the design.

        A design with random demonstrations needs room for at least one of them. With ``nearest``,
        the answer is always yes, since the room is checked row by row.
        """
        return not design.shots or design.demonstrations == "nearest" or self._random(design)[1] > 0

    def stored_bytes(self, design: Design) -> int:
        """Return the size of the design's text in bytes.

        With ``nearest`` all training rows count, since any of them may be needed.
        """
        encoder = self.encoder(design)
        texts = [encoder.template.text]
        if design.shots and design.demonstrations == "nearest":
            texts += [written_out(encoder, row, self._data.target) for row in self._rows.train]
        elif design.shots:
            texts.append(self.text(design))
        return sum(len(text.encode()) for text in texts)

    def _made(self, design: Design, split: str) -> tuple[Encoded, float]:
        if (design, split) not in self._kept:
            # Keep one entry only: a split with many demonstrations is large, and designs are
            # evaluated one after another.
            self._kept.clear()
            self._kept[design, split] = self._encode(design, self._rows[split])
        return self._kept[design, split]

    def _encode(self, design: Design, rows: Sequence[Row]) -> tuple[Encoded, float]:
        encoder, target = self.encoder(design), self._data.target
        targets = [encoder.encode_target(row, target) for row in rows]
        texts, average_shown = self._in_front(design, rows)
        encoded = Encoded(
            [encoder.encode_input(row, text) for row, text in zip(rows, texts, strict=True)],
            [ids for ids, _ in targets],
            [label_index for _, label_index in targets],
            reference_texts(rows, self._data) if self._generated else [],
        )
        return encoded, average_shown

    def _in_front(self, design: Design, rows: Sequence[Row]) -> tuple[list[str], float]:
        """Return the text in front of each row, and the average number of demonstrations."""
        if not design.shots:
            return [""] * len(rows), 0.0
        if design.demonstrations == "random":
            text, count = self._random(design)
            return [text] * len(rows), float(count)
        texts_and_counts = [self._nearest(design, row) for row in rows]
        texts = [text for text, _ in texts_and_counts]
        counts = [count for _, count in texts_and_counts]
        return texts, sum(counts) / len(counts)

    def _random(self, design: Design) -> tuple[str, int]:
        """Return the demonstrations for all rows as a text, and their number.

        The longest row of validation and test decides how many of them fit.
        """
        encoder = self.encoder(design)
        rows = (*self._rows.validation, *self._rows.test)
        longest = max(len(encoder.encode_input(row)) for row in rows)
        room = self._room(encoder, longest)
        return demonstrations(
            encoder, self._rows.train, self._data.target, design.shots, design.seed,
            lambda text: len(encoder.input_ids(text)) <= room,
        )  # fmt: skip

    def _nearest(self, design: Design, row: Row) -> tuple[str, int]:
        """Return the row's nearest training rows as a text, and their number.

        The nearest one is last, right in front of the row.
        """
        encoder = self.encoder(design)
        room = self._room(encoder, len(encoder.encode_input(row)))
        texts: list[WrittenText] = []
        for row_index in self._index.nearest(_words(row, encoder), design.shots):
            text = written_out(encoder, self._rows.train[row_index], self._data.target)
            room -= len(encoder.input_ids(joined([text])))
            if room < 0:
                break
            texts.insert(0, text)
        return joined(texts), len(texts)

    def _room(self, encoder: Encoder, input_tokens: int) -> int:
        answer = max(
            (len(ids) for ids in encoder.ended_answers), default=self._data.max_target_tokens
        )
        return self._context - max(answer, self._generated) - input_tokens - BOUNDARY

    @cached_property
    def _index(self) -> _Index:
        encoder = self.encoder(Design())
        return _Index([_words(row, encoder) for row in self._rows.train])


def _words(row: Row, encoder: Encoder) -> Counter[str]:
    text = " ".join(cell_text(row[column]) for column in encoder.template.columns if column in row)
    return Counter(WORD.findall(text.lower()))


class _Index:
    """A search index of training rows by the cosine of tf-idf weights of their words."""

    def __init__(self, rows: Sequence[Counter[str]]) -> None:
        self._size = len(rows)
        row_counts: dict[str, dict[int, int]] = {}  # for each word, how often each row has it
        for row_index, words in enumerate(rows):
            for word, count in words.items():
                row_counts.setdefault(word, {})[row_index] = count
        self._weights: dict[str, float] = {}
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        squares = np.zeros(len(rows))
        for word, counts in row_counts.items():
            weight = math.log(1 + len(rows) / len(counts))
            row_indices = np.array(list(counts))
            weights = weight * np.array(list(counts.values()), float)
            squares[row_indices] += weights**2
            self._weights[word] = weight
            self._postings[word] = (row_indices, weights)
        self._lengths = np.sqrt(squares) + 1e-9

    def nearest(self, words: Counter[str], count: int) -> list[int]:
        """Return the indices of the nearest rows, nearest first; ties keep the rows' order."""
        scores = np.zeros(self._size)
        for word, query_count in words.items():
            if word in self._postings:
                row_indices, weights = self._postings[word]
                scores[row_indices] += query_count * self._weights[word] * weights
        order = np.argsort(-scores / self._lengths, kind="stable")
        nearest_rows: list[int] = order[:count].tolist()
        return nearest_rows
