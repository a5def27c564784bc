"""The OpenAPI description of each route: bodies, answers and errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from orchestrator.serving.http.protocol import (
    ChatAnswer,
    ChatRequest,
    ClassifyAnswer,
    ClassifyRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorAnswer,
    ModelEntry,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from orchestrator.utils.documents import JsonObject

READING = (401, 403, 429)
ASKING = (400, 401, 403, 404, 413, 429, 500, 503, 504)
MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
}
TEXTS = {
    400: "What was sent is wrong",
    401: "No valid key",
    403: "Not from here",
    404: "No such model",
    413: "Too large",
    429: "Too many requests; Retry-After says when",
    500: "The server's own fault",
    503: "Not now",
    504: "Too slow",
}


def describe(path: str) -> JsonObject:
    """Return FastAPI's keyword arguments that document a route."""
    routes: dict[str, JsonObject] = {
        "/health": {"responses": {200: {"description": "Alive"}, 503: {"description": "Failing"}}},
        "/metrics": {
            "responses": {
                200: {"description": "Prometheus metrics", "content": {"text/plain": {}}},
                **_errors(READING),
            }
        },
        "/openapi.json": {"include_in_schema": False},
        "/v1/models": {"responses": {200: {"model": ModelList}, **_errors(READING)}},
        "/v1/models/{model:path}": {
            "responses": {200: {"model": ModelEntry}, **_errors((*READING, 404, 500, 503))},
            "openapi_extra": {"parameters": [MODEL]},
        },
        "/v1/completions": _asking(CompletionRequest, CompletionAnswer, streams=True),
        "/v1/chat/completions": _asking(ChatRequest, ChatAnswer, streams=True),
        "/classify": _asking(ClassifyRequest, ClassifyAnswer),
        "/tokenize": _asking(TokenizeRequest, TokenizeAnswer),
        "/detokenize": _asking(DetokenizeRequest, DetokenizeAnswer),
        "/tokenizer_info": {"responses": {200: {"model": TokenizerInfo}, **_errors(READING)}},
    }
    return {"summary": path, **routes[path]}


def _asking(body: type[BaseModel], answer: type[BaseModel], streams: bool = False) -> JsonObject:
    # The schema is written into the path itself: FastAPI does not read these bodies, so it would
    # not collect their definitions.
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _resolved(schema, definitions)}}
    success: JsonObject = {"model": answer}
    if streams:
        success["content"] = {"text/event-stream": {}}
    return {
        "responses": {200: success, **_errors(ASKING)},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _resolved(schema: Any, definitions: JsonObject) -> Any:
    """Replace references in a schema by their definitions, of which none refers to itself."""
    if isinstance(schema, list):
        return [_resolved(entry, definitions) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _resolved(definitions[reference.rsplit("/", 1)[-1]], definitions)
    return {key: _resolved(value, definitions) for key, value in schema.items()}


def _errors(statuses: tuple[int, ...]) -> dict[int | str, JsonObject]:
    return {status: {"model": ErrorAnswer, "description": TEXTS[status]} for status in statuses}
