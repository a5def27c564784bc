"""What goes over the wire: OpenAI's requests, answers, chunks and errors, and /classify in the same manner."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator.job.labels import Label

MAX_INT = 2**63 - 1
MAX_COLUMNS = 256
MAX_MESSAGES = 256

Row: TypeAlias = Annotated[dict[str, Any], Field(max_length=MAX_COLUMNS)]
"""Cells of any JSON type; the template turns them into text as training does."""
ModelName: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
FinishReason: TypeAlias = Literal["stop", "length"]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
StopList: TypeAlias = Annotated[list[Stop], Field(max_length=4)]


class ApiError(Exception):
    """An error as the client gets it, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class WireRequest(BaseModel):
    """A request body: exact types, and no field that would be silently left undone."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    )
    """Fields that clients send along and that change no answer."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, and the values at which they change nothing."""

    model: ModelName

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """All fields that are taken, and no other."""
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core_schema))
        allowed = {name: {"enum": [*values, None]} for name, values in cls.neutral.items()}
        schema["properties"] = {
            **schema["properties"],
            **allowed,
            **{name: {} for name in sorted(cls.harmless)},
        }
        return {**schema, "additionalProperties": False}

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for field, value in body.items():
                cls._check_field(field, value)
        return body

    @classmethod
    def _check_field(cls, field: str, value: Any) -> None:
        if field in cls.neutral:
            if not any(
                type(value) is type(one) and value == one for one in (*cls.neutral[field], None)
            ):
                raise _field_error(field, "is not supported by this server; leave it out")
        elif field not in cls.model_fields and field not in cls.harmless:
            close = difflib.get_close_matches(field[:50], [*cls.model_fields, *cls.neutral], n=1)
            raise _field_error(
                field, "is not recognised" + (f"; did you mean {close[0]!r}?" if close else "")
            )


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    """A last chunk without choices that has the usage."""


class GenerationRequest(WireRequest):
    """What completions and chat completions have in common."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | StopList | None = None
    seed: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "is allowed with stream only")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is put through the served prompt's own template, as it was tuned."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "logit_bias": ({},),
        "presence_penalty": (0, 0.0),
        "frequency_penalty": (0, 0.0),
    }

    prompt: str | Annotated[list[str], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(BaseModel):
    """A piece of a message's text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation; text only."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """A client may send back what it got, with the fields that say nothing."""
        if not isinstance(message, dict):
            return message
        return {
            key: value
            for key, value in message.items()
            if key in cls.model_fields or value not in (None, [])
        }

    @property
    def text(self) -> str:
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. The last message passes through the served prompt's own template."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "logit_bias": ({},),
        "presence_penalty": (0, 0.0),
        "frequency_penalty": (0, 0.0),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens at most, under either of OpenAI's names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _top_belongs_to_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "is allowed with logprobs only")
        return self


class ClassifyRequest(WireRequest):
    """POST /classify. Each input is a text (for a template with one column) or a row with the template's columns."""

    input: str | Row | Annotated[list[str | Row], Field(min_length=1)]

    @property
    def inputs(self) -> list[str | dict[str, Any]]:
        return list(self.input) if isinstance(self.input, list) else [self.input]


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(Answer):
    prompt_tokens: int
    """Tokens of the input as the model saw it, without the virtual tokens."""
    completion_tokens: int
    """Tokens made, the end token included."""
    total_tokens: int


class Logprobs(Answer):
    """A completion's tokens, each list with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(Answer):
    index: int
    text: str
    finish_reason: FinishReason | None
    """None in chunks but for the last."""
    logprobs: Logprobs | None = None


class CompletionAnswer(Answer):
    """A completion, or one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """The version that answered, name:version."""
    choices: list[Choice]
    usage: Usage | None = None


class ChatLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    """The version that answered, name:version."""
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class ChatChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail


class Classified(Answer):
    index: int
    label: Label
    probs: dict[str, float]


class ClassifyAnswer(Answer):
    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str
    """The version that answered, name:version."""
    data: list[Classified]


class ModelEntry(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "orchestrator"
    root: str
    """The base model."""
    version: int
    alias: str
    labels: list[Label] | None
    """What /classify chooses from; null for a prompt without labels."""


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


RequestType = TypeVar("RequestType", bound=WireRequest)


def parse_body(kind: type[RequestType], body: bytes) -> RequestType:
    """A request body as its model; ApiError 400 names the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False, include_context=True)) from None


def _field_error(field: str, message: str) -> PydanticCustomError:
    shown = field if field.isprintable() and len(field) <= 100 else json.dumps(field[:100])
    context = {"field": shown, "quoted": repr(shown), "message": message}
    return PydanticCustomError("field", "{quoted} {message}", context)


def _as_api_error(problems: list[ErrorDetails]) -> ApiError:
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}", "invalid_json")
    if first["type"] == "field":
        return ApiError(400, first["msg"], "unsupported_parameter", str(first["ctx"]["field"]))
    where = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, _wrong_value(problems), "invalid_value", where)


def _wrong_value(problems: list[ErrorDetails]) -> str:
    """The first problem in words; a union reports one problem for each of its members, all at the same field."""
    first = problems[0]
    if not first["loc"]:
        return "The body must be a JSON object"
    field = first["loc"][0]
    if first["type"] == "missing":
        return f"{field!r} is required"
    same = list(
        dict.fromkeys(
            it["msg"][0].lower() + it["msg"][1:] for it in problems if it["loc"][0] == field
        )
    )
    return f"{field!r} is wrong: {'; or '.join(same[:4])}"
