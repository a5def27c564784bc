"""The service between HTTP and the engine: it finds prompts, tokenizes inputs and checks limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from orchestrator.errors import BadInput, OrchestratorError, Unreachable
from orchestrator.models.placeholders import text_ids
from orchestrator.registry import CHAMPION
from orchestrator.registry.versions.refs import printable
from orchestrator.serving.engine.constraints import Constraint, ConstraintFailed
from orchestrator.serving.engine.engine import Overloaded, ServingEngine
from orchestrator.serving.engine.generation import Completion, Delta, Sampling
from orchestrator.serving.engine.grammars import BadRule, Grammars, TooComplex
from orchestrator.serving.engine.input_scores import ScoredToken
from orchestrator.serving.http import answers
from orchestrator.serving.http.chat import NoChatTemplate, encode_chat
from orchestrator.serving.http.inputs import (
    InputReport,
    echoed_logprobs,
    encode_inputs,
    prompt_logprobs,
)
from orchestrator.serving.http.metrics import Metrics
from orchestrator.serving.http.protocol import (
    ApiError,
    ChatAnswer,
    ChatRequest,
    Classified,
    ClassifyAnswer,
    ClassifyRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    GenerationRequest,
    ModelEntry,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from orchestrator.serving.http.request_record import RequestRecord
from orchestrator.serving.http.sampling import choices_of, sampling_of
from orchestrator.serving.http.structured import AskedRule
from orchestrator.serving.http.tokenization import detokenize, tokenize, tokenizer_info
from orchestrator.serving.prompts.served_prompt import (
    ContextExceeded,
    Given,
    ServedPrompt,
    classified,
)
from orchestrator.serving.prompts.store import ModelCard, ModelNotFound, PromptStore

Tokens = TypeVar("Tokens")
Answers = TypeVar("Answers")


@dataclass(frozen=True)
class RequestLimits:
    """The limits on a request's size and duration."""

    max_inputs: int = 256
    max_body_bytes: int = 4 << 20
    seconds: float = 300.0
    """The time from the request to its last token, which also ends a stream that nobody reads."""


@dataclass(frozen=True)
class PreparedRequest:
    """A completion or chat request after its checks and tokenization."""

    prompt: ServedPrompt
    inputs: list[list[int]]
    sampling: Sampling
    head: answers.Head
    choices: int = 1
    """The number of answers to each input; the answers to an input follow each other."""
    echoes: tuple[str, ...] = ()
    """The text of each input, if answers begin with it."""
    prompt_logprobs: int | None = None
    """The number of likeliest tokens to report for each token of the inputs, if that is asked."""

    @property
    def rows(self) -> list[list[int]]:
        """The input of each answer."""
        return [ids for ids in self.inputs for _ in range(self.choices)]

    @property
    def samplings(self) -> Sampling | list[Sampling]:
        """The rule of all answers, or of each."""
        if self.choices == 1:
            return self.sampling
        return choices_of(self.sampling, len(self.inputs), self.choices)

    @property
    def reports_inputs(self) -> bool:
        return bool(self.echoes) or self.prompt_logprobs is not None

    @property
    def prompt_tokens(self) -> int:
        """The number of input tokens, without virtual tokens."""
        return sum(len(text_ids(ids)) for ids in self.inputs)


class PromptService:
    """The work behind the routes, without HTTP.

    Its methods raise ApiError for mistakes of the client and for conditions that may pass.
    """

    def __init__(
        self,
        store: PromptStore,
        engine: ServingEngine,
        limits: RequestLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.store = store
        self.engine = engine
        self.limits = limits or RequestLimits()
        self.metrics = metrics or Metrics()
        # A single thread, because a tokenizer that changes its own settings is not thread-safe.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._loading = ThreadPoolExecutor(4, thread_name_prefix="prompt-load")
        self._grammars = Grammars(engine.backbone)

    @property
    def healthy(self) -> bool:
        """Tell whether the engine's thread is running."""
        return self.engine.alive

    def close(self) -> None:
        """Stop all threads; waiting requests are refused."""
        self.store.close()
        self.engine.close()
        self._tokenizing.shutdown(wait=False)
        self._loading.shutdown(wait=False)
        self._grammars.close()

    def models(self, record: RequestRecord) -> ModelList:
        """List the served models that the request's key may use."""
        return ModelList(
            data=[_entry(card) for card in self.store.cards() if _allowed(record, card.name)]
        )

    async def model(self, model_id: str, record: RequestRecord) -> ModelEntry:
        """Describe one model of the list, or any other reference that requests may use.

        Raises ApiError 404 when there is no such model or the request's key may not use it.
        """
        for card in self.store.cards():
            if model_id in (card.id, f"{card.name}@{card.alias}") and _allowed(record, card.name):
                return _entry(card)
        prompt = await self._loaded(model_id)
        if not _allowed(record, prompt.name):
            raise _not_found(f"The model {printable(model_id)!r} does not exist")
        return _entry(self.store.card_of(model_id, prompt))

    async def classify(self, request: ClassifyRequest, record: RequestRecord) -> ClassifyAnswer:
        """Answer POST /classify."""
        self._check_count(len(request.inputs), "input")
        prompt = await self._prompt(request.model, record)
        if reason := prompt.why_no_labels:
            raise _unsupported(
                request.model, reason, "/v1/completions" if prompt.generates else None
            )
        encoded = await self._encode(prompt, request.inputs, prompt.longest_answer, "input")
        self._count(record, sum(len(text_ids(ids)) for ids in encoded), 0)
        probs = await self._run(self.engine.classify(prompt, encoded))
        rows = (classified(prompt.labels, prompt.label_keys, row) for row in probs)
        return ClassifyAnswer(
            model=request.model,
            system_fingerprint=prompt.id,
            data=[Classified(index=index, **row) for index, row in enumerate(rows)],
        )

    async def complete(self, request: CompletionRequest, record: RequestRecord) -> CompletionAnswer:
        """Answer POST /v1/completions without a stream."""
        prepared = await self._completion(request, record)
        completions = await self._completed(prepared, record)
        reports = await self._reports(prepared, completions)
        return answers.completion(prepared.head, completions, prepared.prompt_tokens, reports)

    async def chat(self, request: ChatRequest, record: RequestRecord) -> ChatAnswer:
        """Answer POST /v1/chat/completions without a stream."""
        prepared = await self._conversation(request, record)
        completions = await self._completed(prepared, record)
        reports = await self._reports(prepared, completions[:1])
        return answers.chat(prepared.head, completions, prepared.prompt_tokens, *reports)

    async def tokenize(self, request: TokenizeRequest, record: RequestRecord) -> TokenizeAnswer:
        """Answer POST /tokenize."""
        prompt = await self._prompt(request.model, record) if request.model else None
        work = partial(tokenize, request, self.engine.backbone, prompt)
        return await self._tokenized(work, "prompt" if request.messages is None else "messages")

    async def detokenize(
        self, request: DetokenizeRequest, record: RequestRecord
    ) -> DetokenizeAnswer:
        """Answer POST /detokenize."""
        if request.model:
            await self._prompt(request.model, record)
        return await self._tokenized(partial(detokenize, request, self.engine.backbone), "tokens")

    def tokenizer_info(self) -> TokenizerInfo:
        """Answer GET /tokenizer_info."""
        return tokenizer_info(self.engine.backbone)

    async def stream(
        self, request: CompletionRequest | ChatRequest, record: RequestRecord
    ) -> AsyncIterator[answers.Chunk]:
        """Return the chunks of an answer once the engine has accepted the request.

        ApiError for a refused request is raised here, before the first chunk.
        """
        kind: type[answers.ChatStream | answers.CompletionStream]
        if isinstance(request, ChatRequest):
            prepared = await self._conversation(request, record)
            kind = answers.ChatStream
        else:
            prepared = await self._completion(request, record)
            kind = answers.CompletionStream
        record.streamed = True
        with _refusals():
            deltas = self.engine.stream(prepared.prompt, prepared.rows, prepared.samplings)
        return self._chunks(kind(prepared.head), deltas, prepared, request.wants_usage, record)

    async def _chunks(
        self,
        shape: answers.Stream,
        deltas: AsyncIterator[tuple[int, Delta]],
        prepared: PreparedRequest,
        wants_usage: bool,
        record: RequestRecord,
    ) -> AsyncIterator[answers.Chunk]:
        completion_tokens = 0
        echoing = set(range(len(prepared.rows))) if prepared.echoes else set()
        try:
            for chunk in shape.opening(len(prepared.rows)):
                yield chunk
            with _refusals():
                async for row, delta in _until(deltas, self.limits.seconds):
                    completion_tokens += delta.tokens
                    if row in echoing:
                        echoing.remove(row)
                        yield shape.echo(row, await self._report(prepared, row, delta.input_scores))
                    yield shape.chunk(row, delta)
            if wants_usage:
                yield shape.closing(prepared.prompt_tokens, completion_tokens)
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]
            self._count(record, prepared.prompt_tokens, completion_tokens)

    async def _completion(
        self, request: CompletionRequest, record: RequestRecord
    ) -> PreparedRequest:
        self._check_count(len(request.prompts), "prompt")
        self._check_choices(request, len(request.prompts))
        prompt = await self._generating_prompt(request.model, record)
        sampling = self._sampling(request, prompt, request.max_tokens, request.logprobs)
        echo = bool(request.echo)
        work = partial(
            encode_inputs, prompt, request.prompts, sampling.max_tokens, echo, self._vocabulary
        )
        inputs = await self._tokenized(work, "prompt")
        sampling = await self._constrained(sampling, request, prompt)
        return PreparedRequest(
            prompt,
            [entry.ids for entry in inputs],
            sampling,
            answers.Head.new("cmpl", request.model, prompt.id),
            request.choices,
            tuple(entry.echo or "" for entry in inputs) if echo else (),
            request.prompt_logprobs,
        )

    @property
    def _vocabulary(self) -> int:
        """The number of the model's tokens."""
        return len(self.engine.backbone.table)

    def _sampling(
        self,
        request: GenerationRequest,
        prompt: ServedPrompt,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> Sampling:
        """Return the request's rule. Raises ApiError for scores of an input that has none."""
        sampling = sampling_of(request, max_tokens, logprobs, self._vocabulary)
        if isinstance(request, CompletionRequest) and request.echo and logprobs is not None:
            count = max(logprobs, request.prompt_logprobs or 0)
            sampling = replace(sampling, prompt_logprobs=count)
        if sampling.prompt_logprobs is not None and prompt.encoder.family != "causal":
            family = prompt.encoder.family
            field = "prompt_logprobs" if request.prompt_logprobs is not None else "echo"
            message = f"{field!r} needs a causal model: a {family} model does not predict its input"
            raise ApiError(400, message, "unsupported_operation", field)
        return sampling

    async def _generating_prompt(self, model: str, record: RequestRecord) -> ServedPrompt:
        """Return the prompt of that name; ApiError if it can't generate text."""
        prompt = await self._prompt(model, record)
        if reason := prompt.why_no_text:
            raise _unsupported(model, reason, "/classify" if prompt.answers else None)
        return prompt

    async def _conversation(self, request: ChatRequest, record: RequestRecord) -> PreparedRequest:
        self._check_choices(request, 1)
        prompt = await self._generating_prompt(request.model, record)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        sampling = self._sampling(request, prompt, request.limit, logprobs)
        work = partial(encode_chat, prompt, request.messages, sampling.max_tokens)
        ids = await self._tokenized(work, "messages")
        sampling = await self._constrained(sampling, request, prompt)
        return PreparedRequest(
            prompt,
            [ids],
            sampling,
            answers.Head.new("chatcmpl", request.model, prompt.id),
            request.choices,
            prompt_logprobs=request.prompt_logprobs,
        )

    async def _constrained(
        self, sampling: Sampling, request: GenerationRequest, prompt: ServedPrompt
    ) -> Sampling:
        """Add the constraint that the request asks for; ApiError if it can't be used."""
        if request.asked_rule is None:
            return sampling
        constraint = await self._run(self._constraint(request.asked_rule, prompt))
        return replace(sampling, constraint=constraint)

    async def _constraint(self, asked: AskedRule, prompt: ServedPrompt) -> Constraint:
        try:
            return await self._grammars.constraint(asked.rule, prompt)
        except BadRule as error:
            code = "constraint_too_complex" if isinstance(error, TooComplex) else "bad_constraint"
            raise ApiError(400, _with_hint(error), code, asked.field) from None

    async def _completed(
        self, prepared: PreparedRequest, record: RequestRecord
    ) -> list[Completion]:
        completions: list[Completion] = await self._run(
            self.engine.complete(prepared.prompt, prepared.rows, prepared.samplings)
        )
        completion_tokens = sum(completion.tokens for completion in completions)
        self._count(record, prepared.prompt_tokens, completion_tokens)
        return completions

    async def _reports(
        self, prepared: PreparedRequest, completions: Sequence[Completion]
    ) -> list[InputReport]:
        """Return what the answers say about their inputs; empty if that is not asked."""
        if not prepared.reports_inputs:
            return []
        return [
            await self._report(prepared, row, completion.input_scores)
            for row, completion in enumerate(completions)
        ]

    async def _report(
        self, prepared: PreparedRequest, row: int, scores: Sequence[ScoredToken]
    ) -> InputReport:
        return await self._tokenized(partial(_input_report, prepared, row, scores), "prompt")

    def _count(self, record: RequestRecord, prompt_tokens: int, completion_tokens: int) -> None:
        record.prompt_tokens, record.completion_tokens = prompt_tokens, completion_tokens
        self.metrics.tokens(record.model, prompt_tokens, completion_tokens)

    def _check_choices(self, request: GenerationRequest, inputs: int) -> None:
        most = self.limits.max_inputs
        if request.choices > 1 and inputs * request.choices > most:
            raise ApiError(
                400,
                f"'n' asks for {inputs * request.choices} answers, at most {most} are allowed",
                "too_many_inputs",
                "n",
            )

    def _check_count(self, count: int, param: str) -> None:
        if count > self.limits.max_inputs:
            raise ApiError(
                400,
                f"{param!r} holds {count} entries, at most {self.limits.max_inputs} are allowed",
                "too_many_inputs",
                param,
            )

    async def _prompt(self, model: str, record: RequestRecord) -> ServedPrompt:
        """Return the prompt that answers this request, after canary routing and the key's check.

        The whole request uses this version, even if an alias moves in the meantime. If the canary's
        version can't be loaded, the champion answers.
        """
        routed_model = self.store.route(model)
        try:
            prompt = await self._loaded(routed_model)
        except ApiError:
            if routed_model == model:
                raise
            prompt = await self._loaded(f"{model}@{CHAMPION}")  # the canary can't be loaded
        if not _allowed(record, prompt.name):
            raise _not_found(f"The model {printable(model)!r} does not exist")
        record.model, record.version = prompt.name, prompt.version
        return prompt

    async def _loaded(self, model: str) -> ServedPrompt:
        try:
            loaded = self.store.loaded(model)
            if loaded is not None:
                return loaded
            return await asyncio.get_running_loop().run_in_executor(
                self._loading, self.store.get, model
            )
        except ModelNotFound as error:
            raise _not_found(error.message) from None
        except Unreachable:
            raise _unavailable(
                "The registry can't be reached and this model is not loaded"
            ) from None

    async def _encode(
        self, prompt: ServedPrompt, texts: Sequence[Given], answer_tokens: int, param: str
    ) -> list[list[int]]:
        return await self._tokenized(partial(_encode_all, prompt, texts, answer_tokens), param)

    async def _tokenized(self, work: Callable[[], Tokens], param: str) -> Tokens:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except ContextExceeded as error:
            raise ApiError(400, error.message, "context_length_exceeded", param) from None
        except NoChatTemplate as error:
            raise ApiError(400, error.message, "chat_template_missing", param) from None
        except BadInput as error:
            raise ApiError(400, _with_hint(error), "invalid_value", param) from None

    async def _run(self, work: Awaitable[Answers]) -> Answers:
        with _refusals():
            return await asyncio.wait_for(work, self.limits.seconds)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the engine's errors and timeouts into the ApiError that the client receives."""
    try:
        yield
    except Overloaded as error:
        headers = {"Retry-After": str(error.retry_after)}
        raise ApiError(
            429, f"{error.message}; {error.hint}", "server_overloaded", headers=headers
        ) from None
    except TimeoutError:
        raise ApiError(
            504, "The request took longer than this server allows", "request_timeout"
        ) from None
    except ConstraintFailed as error:
        raise ApiError(400, _with_hint(error), "constraint_failed") from None
    except OrchestratorError as error:
        raise _unavailable(error.message) from None


def _with_hint(error: BadInput) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


async def _until(events: AsyncIterator[Tokens], seconds: float) -> AsyncIterator[Tokens]:
    """Yield the events; raise TimeoutError once they have taken ``seconds`` in total."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        try:
            event = await asyncio.wait_for(anext(events), max(0.0, end - loop.time()))
        except StopAsyncIteration:
            return
        yield event


def _encode_all(
    prompt: ServedPrompt, texts: Sequence[Given], answer_tokens: int
) -> list[list[int]]:
    return [prompt.encode(text, answer_tokens) for text in texts]


def _input_report(
    prepared: PreparedRequest, row: int, scores: Sequence[ScoredToken]
) -> InputReport:
    """Render what an answer says about its input."""
    tokenizer = prepared.prompt.encoder.tokenizer
    count = prepared.prompt_logprobs
    echo, logprobs = "", None
    if prepared.echoes:
        echo = prepared.echoes[row // prepared.choices]
        if (tops := prepared.sampling.logprobs) is not None:
            logprobs = echoed_logprobs(tokenizer, scores, tops)
    return InputReport(
        echo, logprobs, None if count is None else prompt_logprobs(tokenizer, scores, count)
    )


def _allowed(record: RequestRecord, name: str) -> bool:
    return record.key is None or record.key.allows(name)


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(
        id=card.id,
        created=card.created,
        root=card.base_model,
        parent=card.base_model,
        version=card.version,
        alias=card.alias,
        labels=list(card.labels) or None,
    )


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, "model_not_found", "model")


def _unsupported(model: str, reason: str, route: str | None) -> ApiError:
    """Build the error for a model that exists but does not support the route."""
    alternative = f"; use {route}" if route else ""
    message = f"The model {model!r} {reason}{alternative}"
    return ApiError(400, message, "unsupported_operation", "model")


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})
