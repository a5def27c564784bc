"""Incremental detokenization: the text of a row that grows by one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.models.tokenizer import Tokenizer

# Tokens decoded in front of the new ones: enough for any decoder to see a continuation.
CONTEXT_TOKENS = 6
WINDOW = 32  # the last tokens, decoded again with each new token; the text before them is final
BROKEN = "\ufffd"  # a decoder's mark for a character whose last bytes are still missing


class RowText:
    """The text of a row's new tokens, decoded together with the tokens before them.

    Decoded alone, new tokens may lose their leading space. Decoding all tokens again for each new
    token would take quadratic time, so only a window of recent tokens is decoded again.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(before)[-CONTEXT_TOKENS:]
        self._head = self._decoded(self._context)
        self._open: list[int] = []
        self._settled = ""
        self._text: str | None = ""

    def add(self, token: int) -> None:
        """Append one token."""
        if len(self._open) >= WINDOW:
            self._settle()
        self._open.append(token)
        self._text = None

    @property
    def text(self) -> str:
        """The whole text so far."""
        if self._text is None:
            self._text = self._settled + self._window()
        return self._text

    def shown(self, stops: Sequence[str]) -> str:
        """Return the part of the text that no later token can change.

        Leaves out an unfinished character at the end, and an end that may be the beginning of one
        of the ``stops``.
        """
        text = self.text.rstrip(BROKEN)
        longest = max(map(len, stops), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in stops):
                return text[:start]
        return text

    def _settle(self) -> None:
        """Make the text so far final and start a new window, unless a character is unfinished."""
        if self.text.endswith(BROKEN) and len(self._open) < 2 * WINDOW:
            return  # wait for the rest of the character, for up to one more window
        self._settled = self.text
        self._context = [*self._context, *self._open][-CONTEXT_TOKENS:]
        self._head = self._decoded(self._context)
        self._open = []

    def _window(self) -> str:
        """Return the text of the window's tokens."""
        text = self._decoded([*self._context, *self._open])
        return text[len(self._head) :] if text.startswith(self._head) else self._decoded(self._open)

    def _decoded(self, tokens: Sequence[int]) -> str:
        # Cleaning up spaces ("a ." to "a.") would change the text that was generated.
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
