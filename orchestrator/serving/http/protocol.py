"""The wire formats: OpenAI's requests, answers, chunks and errors, and /classify in their style."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

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
from orchestrator.serving.http.fields import field_error as _field_error
from orchestrator.serving.http.sampling_fields import (
    MAX_INT,
    SamplingFields,
    TokenIds,
    value_error,
)
from orchestrator.serving.http.structured import ConstrainedFields

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


class WireBody(BaseModel):
    """A request body with strict types and without fields that the server would ignore."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "cache_salt",
        }
    )
    """Fields that clients may send and that do not affect the answer."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Unsupported fields, with the values that are accepted because they change nothing."""

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


class WireRequest(WireBody):
    """A request body that names the served prompt."""

    model: ModelName


class StreamOptions(BaseModel):
    """Options for the contents of a stream."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    """End the stream with a chunk that has the usage and no choices."""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "priority": (0,),
    "logits_processors": ([],),
}
"""Fields of vLLM that are not supported, with the values that change nothing."""


class GenerationRequest(ConstrainedFields, SamplingFields, WireRequest):
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

    @property
    def choices(self) -> int:
        """The number of answers to each input."""
        return self.n or 1

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "is allowed with stream only")
        if self.prompt_logprobs is not None and self.stream:
            raise _field_error("prompt_logprobs", "is allowed without stream only")
        return self


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions.

    Each text fills the template that the served prompt was tuned with. Token ids are read as they
    are, without a template and without special tokens.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, fail_fast=True)
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    """The most tokens of an answer; 0 returns the input alone and needs ``echo``."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    """Return the input in front of each answer, with ``logprobs`` its tokens' too."""
    best_of: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    """Taken if it equals ``n``, so that there is nothing to choose from."""

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)

    @model_validator(mode="after")
    def _every_answer_has_a_use(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise _field_error("best_of", "is not supported by this server; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise value_error("max_tokens", "may be 0 with echo only; ask for at least 1")
        return self


class TextPart(BaseModel):
    """A part of a message's text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation, which may contain text only."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] | None
    ) = None
    """The text; null, which is an empty text, for the assistant only."""
    name: Annotated[str, Field(max_length=512)] | None = None
    type: Literal["text", "message"] | None = None
    """Changes nothing; some clients send it."""

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

    @model_validator(mode="after")
    def _only_answers_may_be_empty(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "no_content",
                "a message of role {role} needs content",
                {"role": repr(self.role)},
            )
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions.

    The last message fills the template that the served prompt was tuned with.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "include_reasoning": (True, False),
        "verbosity": (),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
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
    token_logprobs: list[float | None]
    """Null for the first token of an echoed input, as is its entry in ``top_logprobs``."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    """The log-probability of a token at one position of the input."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]
"""For each token of the input, by id, the token itself and the likeliest ones; null first."""


class Choice(Answer):
    """The completion of one prompt, or a piece of it in a stream."""

    index: int
    text: str
    finish_reason: FinishReason | None
    """The reason that the text ended; in a stream, None in all chunks but the text's last."""
    logprobs: Logprobs | None = None


class ScoredChoice(Choice):
    """A completion with the log-probabilities of its input's tokens."""

    prompt_logprobs: PromptLogprobs


class CompletionAnswer(Answer):
    """A completion, or one chunk of a streamed completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """The version that answered, as ``name:version``."""
    choices: list[ScoredChoice | Choice]
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


class ScoredChatAnswer(ChatAnswer):
    """A chat answer with the log-probabilities of its input's tokens."""

    prompt_logprobs: PromptLogprobs


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


class TokenizeRequest(WireBody):
    """The body of POST /tokenize, for a text or a conversation.

    A text is tokenized alone, as the base model's tokenizer does it; with ``apply_template`` it
    fills the template of the named prompt first, as in /v1/completions.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "tools": ([],),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    }

    model: ModelName | None = None
    """The served prompt; all prompts have the same tokenizer, so a text alone needs none."""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    apply_template: bool | None = None
    """Fill the prompt's template with the text."""
    add_special_tokens: bool | None = None
    """Add special tokens such as BOS to a text; true by default."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise value_error("prompt", "or 'messages' is required, and not both")
        if self.uses_template and self.model is None:
            raise value_error("model", "is required: its template is filled")
        # A conversation's template writes them itself, and a text in a template always has them.
        if self.uses_template and self.add_special_tokens is (self.messages is not None):
            raise value_error("add_special_tokens", "is allowed for a text alone only")
        return self

    @property
    def uses_template(self) -> bool:
        """Tell whether the tokens are those of a request to the named prompt."""
        return self.messages is not None or bool(self.apply_template)


class TokenizeAnswer(Answer):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    """The tokens that an input and its answer may have together; virtual tokens are left out."""
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(WireBody):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    tokens: TokenIds


class DetokenizeAnswer(Answer):
    """The answer of /detokenize."""

    prompt: str


class TokenizerInfo(Answer):
    """The answer of /tokenizer_info, with the keys of a tokenizer_config.json."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int
    """The base model's context."""


class ModelEntry(Answer):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "orchestrator"
    root: str
    """The id of the base model."""
    parent: str
    """The same: the prompt is an adapter of this model."""
    version: int
    alias: str
    labels: list[Label] | None
    """The labels that /classify chooses from; null for a prompt without labels."""


class ModelList(Answer):
    """The served models that the request's key may use."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


RequestType = TypeVar("RequestType", bound=WireBody)


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
    if first["type"] == "value":
        return ApiError(400, first["msg"], "invalid_value", str(first["ctx"]["field"]))
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
