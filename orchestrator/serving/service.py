"""Requests to answers, between HTTP and the engine: which prompt, which tokens, which limits."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator.errors import BadInput, OrchestratorError, Unreachable
from orchestrator.placing import text_ids
from orchestrator.serving.engine import Engine, Overloaded
from orchestrator.serving.generation import Completion, Sampling
from orchestrator.serving.prompt_store import ModelCard, ModelNotFound, PromptStore
from orchestrator.serving.protocol import (
    ApiError,
    Choice,
    Classified,
    ClassifyAnswer,
    ClassifyRequest,
    CompletionAnswer,
    CompletionRequest,
    ModelEntry,
    ModelList,
    Usage,
)
from orchestrator.serving.served_prompt import ContextExceeded, Given, ServedPrompt, classified

DEFAULT_MAX_TOKENS = 16  # OpenAI's
DEFAULT_TEMPERATURE = 1.0  # OpenAI's


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold."""

    max_inputs: int = 256
    max_body_bytes: int = 4 << 20


class PromptService:
    """The routes' work, without HTTP. Raises ApiError for whatever a client did wrong, or should try again."""

    def __init__(self, store: PromptStore, engine: Engine, limits: RequestLimits | None = None) -> None:
        self.store = store
        self.engine = engine
        self.limits = limits or RequestLimits()
        # One thread: a tokenizer is not safe to use from several while it changes its own settings.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._loading = ThreadPoolExecutor(4, thread_name_prefix="prompt-load")

    @property
    def healthy(self) -> bool:
        return self.engine.alive

    def close(self) -> None:
        """Stop all threads; waiting requests are refused."""
        self.store.close()
        self.engine.close()
        self._tokenizing.shutdown(wait=False)
        self._loading.shutdown(wait=False)

    def models(self) -> ModelList:
        return ModelList(data=[_entry(card) for card in self.store.cards()])

    def model(self, wanted: str) -> ModelEntry:
        """One served model of the list. ApiError 404 when it is not in it."""
        for card in self.store.cards():
            if wanted in (card.id, f"{card.name}@{card.alias}"):
                return _entry(card)
        raise ApiError(404, f"The model {wanted!r} does not exist", "model_not_found", "model")

    async def classify(self, request: ClassifyRequest) -> ClassifyAnswer:
        self._check_count(len(request.inputs), "input")
        prompt = await self._prompt(request.model)
        if reason := prompt.why_no_labels:
            raise _unsupported(request.model, reason, "/v1/completions" if prompt.generates else None)
        encoded = await self._encode(prompt, request.inputs, prompt.longest_answer, "input")
        probs = await self._run(self.engine.classify(prompt, encoded))
        rows = (classified(prompt.labels, prompt.label_keys, row) for row in probs)
        return ClassifyAnswer(
            model=request.model, data=[Classified(index=index, **row) for index, row in enumerate(rows)]
        )

    async def complete(self, request: CompletionRequest) -> CompletionAnswer:
        self._check_count(len(request.prompts), "prompt")
        prompt = await self._prompt(request.model)
        if reason := prompt.why_no_text:
            raise _unsupported(request.model, reason, "/classify" if prompt.answers else None)
        sampling = _sampling(request)
        encoded = await self._encode(prompt, request.prompts, sampling.max_tokens, "prompt")
        made: list[Completion] = await self._run(self.engine.complete(prompt, encoded, sampling))
        return CompletionAnswer(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=[Choice(index=i, text=it.text, finish_reason=it.finish_reason) for i, it in enumerate(made)],
            usage=_usage(sum(len(text_ids(ids)) for ids in encoded), sum(it.tokens for it in made)),
        )

    def _check_count(self, count: int, param: str) -> None:
        if count > self.limits.max_inputs:
            raise ApiError(
                400,
                f"{param!r} holds {count} entries, at most {self.limits.max_inputs} are allowed",
                "too_many_inputs",
                param,
            )

    async def _prompt(self, model: str) -> ServedPrompt:
        try:
            loaded = self.store.loaded(model)
            if loaded is not None:
                return loaded
            return await asyncio.get_running_loop().run_in_executor(self._loading, self.store.get, model)
        except ModelNotFound as error:
            raise ApiError(404, error.message, "model_not_found", "model") from None
        except Unreachable:
            raise _unavailable("The registry can't be reached and this model is not loaded") from None

    async def _encode(
        self, prompt: ServedPrompt, given: Sequence[Given], answer_tokens: int, param: str
    ) -> list[list[int]]:
        try:
            work = partial(_encode_all, prompt, given, answer_tokens)
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except ContextExceeded as error:
            raise ApiError(400, error.message, "context_length_exceeded", param) from None
        except BadInput as error:
            hint = f"; {error.hint}" if error.hint else ""
            raise ApiError(400, f"{error.message}{hint}", "invalid_value", param) from None

    async def _run(self, work: Any) -> list[Any]:
        try:
            answered: list[Any] = await work
            return answered
        except Overloaded as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, f"{error.message}; {error.hint}", "server_overloaded", headers=headers) from None
        except OrchestratorError as error:
            raise _unavailable(error.message) from None


def _encode_all(prompt: ServedPrompt, given: Sequence[Given], answer_tokens: int) -> list[list[int]]:
    return [prompt.encode(one, answer_tokens) for one in given]


def _sampling(request: CompletionRequest) -> Sampling:
    return Sampling(
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        stop=request.stops,
        seed=request.seed,
    )


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(
        id=card.id,
        created=card.created,
        root=card.base_model,
        version=card.version,
        alias=card.alias,
        labels=list(card.labels) or None,
    )


def _unsupported(model: str, reason: str, route: str | None) -> ApiError:
    """The model is there, but does not do what the route asks of it."""
    other = f"; use {route}" if route else ""
    return ApiError(400, f"The model {model!r} {reason}{other}", "unsupported_operation", "model")


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})
