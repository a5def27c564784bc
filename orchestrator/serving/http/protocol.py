"""The wire formats: OpenAI's requests, answers, chunks and errors, and /classify in their style."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from orchestrator.job.labels import Label
from orchestrator.serving.http.fields import field_error as _field_error
from orchestrator.serving.http.structured import ConstrainedFields

MAX_INT = 2**63 - 1
MAX_COLUMNS = 256
MAX_MESSAGES = 256

Row: TypeAlias = Annotated[dict[str, Any], Field(max_length=MAX_COLUMNS)]
"""A row as a JSON object; cells of any JSON type become text in the same way as in training."""
ModelName: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
FinishReason: TypeAlias = Literal["stop", "length"]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
StopList: TypeAlias = Annotated[list[Stop], Field(max_length=4)]


class ApiError(Exception):
    """An error that the client receives, in OpenAI's format."""

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
        """OpenAI's error type for the HTTP status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """Return the error as the JSON body of a response."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class WireRequest(BaseModel):
    """A request body with strict types and without fields that the server would ignore."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    )
    """Fields that clients may send and that do not affect the answer."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Unsupported fields, with the values that are accepted because they change nothing."""

    model: ModelName

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return a schema that lists every accepted field and forbids all others."""
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
            allowed = (*cls.neutral[field], None)
            # True == 1 and 1 == 1.0 in Python, so types are compared too.
            if not any(type(value) is type(entry) and value == entry for entry in allowed):
                raise _field_error(field, "is not supported by this server; leave it out")
        elif field not in cls.model_fields and field not in cls.harmless:
            close = difflib.get_close_matches(field[:50], [*cls.model_fields, *cls.neutral], n=1)
            suggestion = f"; did you mean {close[0]!r}?" if close else ""
            raise _field_error(field, f"is not recognised{suggestion}")


class StreamOptions(BaseModel):
    """Options for the contents of a stream."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    """End the stream with a chunk that has the usage and no choices."""


class GenerationRequest(ConstrainedFields, WireRequest):
    """The fields that completions and chat completions have in common."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | StopList | None = None
    seed: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Tell whether the stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "is allowed with stream only")
        return self


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions.

    Each prompt fills the template that the served prompt was tuned with.
    """

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
    """A part of a message's text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation, which may contain text only."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """Drop unknown fields that are null or empty.

        Clients send earlier answers back with all their fields, including empty ones.
        """
        if not isinstance(message, dict):
            return message
        return {
            key: value
            for key, value in message.items()
            if key in cls.model_fields or value not in (None, [])
        }

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions.

    The last message fills the template that the served prompt was tuned with.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
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
        """The maximum number of tokens: ``max_completion_tokens`` or else ``max_tokens``."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _top_belongs_to_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "is allowed with logprobs only")
        return self


class ClassifyRequest(WireRequest):
    """The body of POST /classify.

    Each input is a text, for a template with one column, or a row with the template's columns.
    """

    input: str | Row | Annotated[list[str | Row], Field(min_length=1)]

    @property
    def inputs(self) -> list[str | dict[str, Any]]:
        return list(self.input) if isinstance(self.input, list) else [self.input]


class Answer(BaseModel):
    """The base of all answers and of their parts."""

    model_config = ConfigDict(frozen=True)


class Usage(Answer):
    """The token counts of an answer."""

    prompt_tokens: int
    """The number of input tokens that the model read, without the virtual tokens."""
    completion_tokens: int
    """The number of generated tokens, including the end token."""
    total_tokens: int


class Logprobs(Answer):
    """The log-probabilities of a completion's tokens; each list has one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(Answer):
    """The completion of one prompt, or a piece of it in a stream."""

    index: int
    text: str
    finish_reason: FinishReason | None
    """The reason that the text ended; in a stream, None in all chunks but the text's last."""
    logprobs: Logprobs | None = None


class CompletionAnswer(Answer):
    """A completion, or one chunk of a streamed completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """The version that answered, as ``name:version``."""
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
    """The version that answered, as ``name:version``."""
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
    """The most likely label of one input, and the probabilities of all labels."""

    index: int
    label: Label
    probs: dict[str, float]


class ClassifyAnswer(Answer):
    """The answer of /classify, with one entry per input."""

    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str
    """The version that answered, as ``name:version``."""
    data: list[Classified]


class ModelEntry(Answer):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "orchestrator"
    root: str
    """The id of the base model."""
    version: int
    alias: str
    labels: list[Label] | None
    """The labels that /classify chooses from; null for a prompt without labels."""


class ModelList(Answer):
    """The served models that the request's key may use."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


RequestType = TypeVar("RequestType", bound=WireRequest)


def parse_body(kind: type[RequestType], body: bytes) -> RequestType:
    """Parse and validate a request body; raise ApiError 400 that names the wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False, include_context=True)) from None


def _as_api_error(problems: list[ErrorDetails]) -> ApiError:
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}", "invalid_json")
    if first["type"] == "field":
        return ApiError(400, first["msg"], "unsupported_parameter", str(first["ctx"]["field"]))
    where = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, _wrong_value(problems), "invalid_value", where)


def _wrong_value(problems: list[ErrorDetails]) -> str:
    """Describe the first wrong field.

    A union type reports one problem for each of its members, so all problems of the field are
    combined.
    """
    first_problem = problems[0]
    if not first_problem["loc"]:
        return "The body must be a JSON object"
    field = first_problem["loc"][0]
    if first_problem["type"] == "missing":
        return f"{field!r} is required"
    messages = [problem["msg"] for problem in problems if problem["loc"][0] == field]
    reasons = list(dict.fromkeys(message[0].lower() + message[1:] for message in messages))
    return f"{field!r} is wrong: {'; or '.join(reasons[:4])}"
