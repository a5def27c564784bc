"""The text of a row that grows by a token at a time, and how much of it can be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = (
    6  # enough in front of the new tokens for any decoder to treat them as a continuation
)
WINDOW = 32  # tokens that are decoded again with each new one; earlier ones stay as they are
BROKEN = "\ufffd"  # a decoder's mark for a character whose last bytes are still to come


class RowText:
    """Text of new tokens as they follow the tokens before them: decoded alone they may lose their leading space.

    Decoding all tokens again for each new one would cost the square of their number.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(before)[-CONTEXT_TOKENS:]
        self._head = self._decoded(self._context)
        self._open: list[int] = []
        self._settled = ""
        self._text: str | None = ""

    def add(self, token: int) -> None:
        if len(self._open) >= WINDOW:
            self._settle()
        self._open.append(token)
        self._text = None

    @property
    def text(self) -> str:
        """All of the text so far."""
        if self._text is None:
            self._text = self._settled + self._window()
        return self._text

    def shown(self, stops: Sequence[str]) -> str:
        """What no later token takes back: without an unfinished character, and without what may begin a stop string."""
        text = self.text.rstrip(BROKEN)
        longest = max(map(len, stops), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in stops):
                return text[:start]
        return text

    def _settle(self) -> None:
        if self.text.endswith(BROKEN) and len(self._open) < 2 * WINDOW:
            return  # in the middle of a character
        self._settled = self.text
        self._context = [*self._context, *self._open][-CONTEXT_TOKENS:]
        self._head = self._decoded(self._context)
        self._open = []

    def _window(self) -> str:
        whole = self._decoded([*self._context, *self._open])
        return (
            whole[len(self._head) :] if whole.startswith(self._head) else self._decoded(self._open)
        )

    def _decoded(self, tokens: Sequence[int]) -> str:
        # Cleaned-up spaces ("a ." to "a.") would be another text than the one that was generated.
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
