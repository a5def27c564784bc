"""Conversion of the engine's results to OpenAI's answers and stream chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from orchestrator.serving.engine.generation import Completion, Delta, TokenLogprob
from orchestrator.serving.http.inputs import NO_REPORT, InputReport
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
    ScoredChatAnswer,
    ScoredChoice,
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
    head: Head,
    completions: Sequence[Completion],
    prompt_tokens: int,
    reports: Sequence[InputReport] = (),
) -> CompletionAnswer:
    """Build the answer of /v1/completions.

    ``reports`` say something about the input of each completion; there may be none.
    """
    reports = reports or [NO_REPORT] * len(completions)
    choices = [
        _choice(index, entry, report)
        for index, (entry, report) in enumerate(zip(completions, reports, strict=True))
    ]
    completion_tokens = sum(entry.tokens for entry in completions)
    return CompletionAnswer(
        **vars(head), choices=choices, usage=usage(prompt_tokens, completion_tokens)
    )


def _choice(index: int, entry: Completion, report: InputReport) -> Choice:
    choice = Choice(
        index=index,
        text=report.echo + entry.text,
        finish_reason=entry.finish_reason,
        logprobs=_joined(report.logprobs, _logprobs(entry.logprobs, len(report.echo))),
    )
    if report.prompt_logprobs is None:
        return choice
    return ScoredChoice(**vars(choice), prompt_logprobs=report.prompt_logprobs)


def chat(
    head: Head,
    completions: Sequence[Completion],
    prompt_tokens: int,
    report: InputReport = NO_REPORT,
) -> ChatAnswer:
    """Build the answer of /v1/chat/completions; its completions have one input."""
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=entry.text),
            finish_reason=entry.finish_reason,
            logprobs=_chat_logprobs(entry.logprobs),
        )
        for index, entry in enumerate(completions)
    ]
    tokens = usage(prompt_tokens, sum(entry.tokens for entry in completions))
    answer = ChatAnswer(**vars(head), choices=choices, usage=tokens)
    if report.prompt_logprobs is None:
        return answer
    return ScoredChatAnswer(**vars(answer), prompt_logprobs=report.prompt_logprobs)


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

    def echo(self, row: int, report: InputReport) -> Chunk:
        """Build the chunk with a row's input."""
        ...

    def chunk(self, row: int, delta: Delta) -> Chunk:
        """Build the chunk for what a row gained."""
        ...

    def closing(self, prompt_tokens: int, completion_tokens: int) -> Chunk:
        """Build the last chunk, which has the usage; sent only if the request asks for it."""


class CompletionStream:
    """The chunks of a streamed /v1/completions answer."""

    def __init__(self, head: Head) -> None:
        self._head = vars(head)
        self._echoed: dict[int, int] = {}

    def opening(self, rows: int) -> Iterator[Chunk]:
        return iter(())

    def echo(self, row: int, report: InputReport) -> CompletionAnswer:
        """Build the chunk with a row's input, which comes before the row's other chunks."""
        self._echoed[row] = len(report.echo)
        choice = Choice(index=row, text=report.echo, finish_reason=None, logprobs=report.logprobs)
        return CompletionAnswer(**self._head, choices=[choice])

    def chunk(self, row: int, delta: Delta) -> CompletionAnswer:
        choice = Choice(
            index=row,
            text=delta.text,
            finish_reason=delta.finish_reason,
            logprobs=_logprobs(delta.logprobs, self._echoed.get(row, 0)),
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

    def echo(self, row: int, report: InputReport) -> ChatChunk:
        raise NotImplementedError("a chat has no echo")

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


def _logprobs(tokens: Sequence[TokenLogprob], before: int = 0) -> Logprobs | None:
    """Build the log-probabilities of tokens that follow ``before`` characters of the text."""
    if not tokens:
        return None
    # OpenAI's format is a mapping from text; of tokens with equal text, the likeliest stays.
    top_logprobs = [dict(reversed([*token.top, (token.text, token.logprob)])) for token in tokens]
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[*top_logprobs],
        text_offset=[before + token.offset for token in tokens],
    )


def _joined(first: Logprobs | None, second: Logprobs | None) -> Logprobs | None:
    """Join the log-probabilities of an echo and of the text behind it."""
    if first is None or second is None:
        return first or second
    return Logprobs(
        tokens=[*first.tokens, *second.tokens],
        token_logprobs=[*first.token_logprobs, *second.token_logprobs],
        top_logprobs=[*first.top_logprobs, *second.top_logprobs],
        text_offset=[*first.text_offset, *second.text_offset],
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
