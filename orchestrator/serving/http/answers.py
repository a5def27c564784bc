"""Conversion of the engine's results to OpenAI's answers and stream chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from orchestrator.serving.engine.generation import Completion, Delta, TokenLogprob
from orchestrator.serving.http.protocol import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatTokenLogprob,
    Choice,
    CompletionAnswer,
    Logprobs,
    Usage,
)

Chunk: TypeAlias = CompletionAnswer | ChatChunk


@dataclass(frozen=True)
class Head:
    """The fields that an answer and all of its chunks have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, version: str) -> Head:
        """Create a head with a random id and the current time."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, version)


def completion(
    head: Head, completions: Sequence[Completion], prompt_tokens: int
) -> CompletionAnswer:
    """Build the answer of /v1/completions."""
    choices = [
        Choice(
            index=i,
            text=entry.text,
            finish_reason=entry.finish_reason,
            logprobs=_logprobs(entry.logprobs),
        )
        for i, entry in enumerate(completions)
    ]
    completion_tokens = sum(entry.tokens for entry in completions)
    return CompletionAnswer(
        **vars(head), choices=choices, usage=usage(prompt_tokens, completion_tokens)
    )


def chat(head: Head, completion: Completion, prompt_tokens: int) -> ChatAnswer:
    """Build the answer of /v1/chat/completions."""
    choice = ChatChoice(
        index=0,
        message=AssistantMessage(content=completion.text),
        finish_reason=completion.finish_reason,
        logprobs=_chat_logprobs(completion.logprobs),
    )
    return ChatAnswer(**vars(head), choices=[choice], usage=usage(prompt_tokens, completion.tokens))


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Build the token counts of an answer."""
    total = prompt_tokens + completion_tokens
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total
    )


class Stream(Protocol):
    """A builder for the chunks of one streamed answer."""

    def opening(self, rows: int) -> Iterator[Chunk]:
        """Yield the chunks that come before any token."""

    def chunk(self, row: int, delta: Delta) -> Chunk:
        """Build the chunk for what a row gained."""
        ...

    def closing(self, prompt_tokens: int, completion_tokens: int) -> Chunk:
        """Build the last chunk, which has the usage; sent only if the request asks for it."""


class CompletionStream:
    """The chunks of a streamed /v1/completions answer."""

    def __init__(self, head: Head) -> None:
        self._head = vars(head)

    def opening(self, rows: int) -> Iterator[Chunk]:
        return iter(())

    def chunk(self, row: int, delta: Delta) -> CompletionAnswer:
        choice = Choice(
            index=row,
            text=delta.text,
            finish_reason=delta.finish_reason,
            logprobs=_logprobs(delta.logprobs),
        )
        return CompletionAnswer(**self._head, choices=[choice])

    def closing(self, prompt_tokens: int, completion_tokens: int) -> CompletionAnswer:
        return CompletionAnswer(
            **self._head, choices=[], usage=usage(prompt_tokens, completion_tokens)
        )


class ChatStream:
    """The chunks of a streamed /v1/chat/completions answer."""

    def __init__(self, head: Head) -> None:
        self._head = vars(head)

    def opening(self, rows: int) -> Iterator[Chunk]:
        for row in range(rows):
            delta = ChatDelta(role="assistant", content="")
            yield ChatChunk(
                **self._head, choices=[ChatChunkChoice(index=row, delta=delta, finish_reason=None)]
            )

    def chunk(self, row: int, delta: Delta) -> ChatChunk:
        choice = ChatChunkChoice(
            index=row,
            delta=ChatDelta(content=delta.text or None),
            finish_reason=delta.finish_reason,
            logprobs=_chat_logprobs(delta.logprobs),
        )
        return ChatChunk(**self._head, choices=[choice])

    def closing(self, prompt_tokens: int, completion_tokens: int) -> ChatChunk:
        return ChatChunk(**self._head, choices=[], usage=usage(prompt_tokens, completion_tokens))


def _logprobs(tokens: Sequence[TokenLogprob]) -> Logprobs | None:
    if not tokens:
        return None
    # OpenAI's format is a mapping from text; of tokens with equal text, the likeliest stays.
    top_logprobs = [dict(reversed([*token.top, (token.text, token.logprob)])) for token in tokens]
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=top_logprobs,
        text_offset=[token.offset for token in tokens],
    )


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
    if not tokens:
        return None
    return ChatLogprobs(content=[_chat_token(token) for token in tokens])


def _chat_token(token: TokenLogprob) -> ChatTokenLogprob:
    return ChatTokenLogprob(
        **_chat_logprob(token.text, token.logprob).model_dump(),
        top_logprobs=[_chat_logprob(text, value) for text, value in token.top],
    )


def _chat_logprob(text: str, value: float) -> ChatLogprob:
    return ChatLogprob(token=text, logprob=value, bytes=list(text.encode("utf-8", "replace")))
