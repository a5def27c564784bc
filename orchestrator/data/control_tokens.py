"""Tokenization that keeps control tokens out of the texts of rows and clients.

A control token, for instance ``<|im_end|>``, tells a model where a turn or a text ends. Only
templates may write one. In any other text the same characters are tokenised as characters: the text
is cut inside them, and its parts are tokenised one after another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from orchestrator.errors import BadInput
from orchestrator.job.spec import SpecialTokens


class TemplateText(str):
    """Text of a template, in which control tokens are read as such."""

    __slots__ = ()


class WrittenText(str):
    """A text of several parts, of which some are a template's."""

    parts: tuple[str, ...]

    def __new__(cls, parts: Iterable[str]) -> WrittenText:
        parts = tuple(parts)
        text = super().__new__(cls, "".join(parts))
        text.parts = parts
        return text


def parts_of(text: str) -> tuple[str, ...]:
    """Return the parts of a text, each wholly from a template or from elsewhere."""
    if isinstance(text, WrittenText):
        return text.parts
    return (text,) if text else ()


class ControlTokens:
    """The control tokens of a tokenizer, and the texts in which they may stand.

    With the rule ``parse``, control tokens are read in every text, as early versions did.
    """

    def __init__(
        self, tokenizer: Any, rule: SpecialTokens = "text", mentioned_in: str = ""
    ) -> None:
        """Collect the tokenizer's special tokens and the added tokens in the text ``mentioned_in``.

        Tokens of one character or of white space are left out, since ordinary texts contain them.
        """
        self.rule = rule
        self._tokenizer = tokenizer
        self._ids = dict(_control_tokens(tokenizer, mentioned_in))
        tokens = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        unknown = tokenizer.unk_token_id  # texts contain unknown characters
        self._watched = frozenset(self._ids.values()) - {unknown}
        self._written: dict[str, tuple[int, ...]] = {}

    def pieces(self, texts: Sequence[str]) -> list[str]:
        """Return the joined texts, cut inside each control token that no template wrote."""
        joined = "".join(texts)
        if self.rule == "parse" or self._pattern is None or not self._pattern.search(joined):
            return [joined]
        boundaries = [0, *sorted(set(self._cuts(joined, texts))), len(joined)]
        return [joined[start:end] for start, end in pairwise(boundaries)]

    def check(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Raise BadInput if a tokenizer still read a control token in a text of no template."""
        if self.rule == "parse":
            return
        control_ids = [token_id for token_id in ids if token_id in self._watched]
        if not control_ids:
            return
        allowed: Counter[int] = Counter()
        for text in texts:
            if isinstance(text, TemplateText):
                allowed.update(self._ids_of(str(text)))
        if unexplained := Counter(control_ids) - allowed:
            token = self._tokenizer.convert_ids_to_tokens(next(iter(unexplained)))
            raise BadInput(
                f"a text holds what the tokenizer reads as its control token {token!r}",
                "leave it out; only templates write control tokens",
            )

    def first_in(self, text: str) -> int | None:
        """Return the id of the first control token in a template's text; None if there is none."""
        return next(iter(self._ids_of(text)), None)

    def _ids_of(self, text: str) -> tuple[int, ...]:
        """Return the ids of the control tokens in a template's text, of which there are few."""
        if text not in self._written:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._written[text] = tuple(token_id for token_id in ids if token_id in self._watched)
        return self._written[text]

    def _cuts(self, joined: str, texts: Sequence[str]) -> Iterator[int]:
        """Yield a place inside each control token that is not wholly in a template's text."""
        ends = [0]
        for text in texts:
            ends.append(ends[-1] + len(text))
        spans = [(*ends, text) for ends, text in zip(pairwise(ends), texts, strict=True)]
        for start, end in self._occurrences(joined):
            boundaries = [position for position in ends if start < position < end]
            if boundaries:
                yield boundaries[0]
                continue
            writer = next(text for first, last, text in spans if first <= start and end <= last)
            if not isinstance(writer, TemplateText):
                yield start + 1

    def _occurrences(self, joined: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of every control token in a text, including overlapping ones."""
        assert self._pattern is not None
        match = self._pattern.search(joined)
        while match:
            yield match.span()
            match = self._pattern.search(joined, match.start() + 1)


def _control_tokens(tokenizer: Any, mentioned_in: str) -> Iterator[tuple[str, int]]:
    """Yield the control tokens with their ids."""
    special = dict.fromkeys(tokenizer.all_special_tokens)
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        text = str(token.content)
        if token.special or text in special or text in mentioned_in:
            special[text] = token_id
    for text, known_id in special.items():
        if len(text) > 1 and not text.isspace():
            token_id = tokenizer.convert_tokens_to_ids(text) if known_id is None else known_id
            yield text, token_id
