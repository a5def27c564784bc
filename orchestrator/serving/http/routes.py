"""The HTTP routes: a FastAPI application on top of a PromptService, without Ray or torch."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.http.access import Access
from orchestrator.serving.http.answers import Chunk
from orchestrator.serving.http.metrics import CONTENT_TYPE
from orchestrator.serving.http.openapi import describe
from orchestrator.serving.http.protocol import (
    ApiError,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestType,
    TokenizeRequest,
    parse_body,
)
from orchestrator.serving.http.request_record import RequestRecord
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.http.tracing import NoTracer, Tracer

log = logging.getLogger(__name__)

HUNG_UP = 499  # the status that servers such as nginx log when a client hung up before its answer
Result = TypeVar("Result")


def make_api(
    service: PromptService, access: Access | None = None, tracer: Tracer | None = None
) -> FastAPI:
    """Build the application.

    All answers except /metrics and streams are JSON; all errors have OpenAI's format.
    """
    # FastAPI's documentation pages are off because they would load scripts from other sites.
    api = FastAPI(title="prompt-orchestrator", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_middleware(
        Gate, access=access or Access(), service=service, tracer=tracer or NoTracer()
    )
    for method, path, handler in (
        ("GET", "/health", _health(service)),
        ("GET", "/metrics", _metrics(service)),
        ("GET", "/openapi.json", _openapi(api)),
        ("GET", "/v1/models", _models(service)),
        ("GET", "/v1/models/{model:path}", _model(service)),
        ("POST", "/v1/completions", _generate(service, CompletionRequest)),
        ("POST", "/v1/chat/completions", _generate(service, ChatRequest)),
        ("POST", "/classify", _answer(service, ClassifyRequest, PromptService.classify)),
        ("POST", "/tokenize", _answer(service, TokenizeRequest, PromptService.tokenize)),
        ("POST", "/detokenize", _answer(service, DetokenizeRequest, PromptService.detokenize)),
        ("GET", "/tokenizer_info", _tokenizer_info(service)),
    ):
        api.add_api_route(path, handler, methods=[method], **describe(path))
    _watch(service)
    return api


def _watch(service: PromptService) -> None:
    metrics, store, engine = service.metrics, service.store, service.engine
    metrics.gauge(
        "orchestrator_waiting_rows", "Rows that no batch has taken yet", lambda: engine.waiting
    )
    metrics.gauge(
        "orchestrator_running_rows", "Rows that are being generated", lambda: engine.running
    )
    metrics.gauge(
        "orchestrator_loaded_prompts", "Prompts beside the model", lambda: store.loaded_count
    )
    metrics.gauge(
        "orchestrator_loaded_prompt_bytes", "Their keys and values", lambda: store.loaded_bytes
    )
    metrics.gauge(
        "orchestrator_host_prompt_bytes",
        "Keys and values in the host's memory",
        lambda: store.host_bytes,
    )
    metrics.watch(store)


class Gate:
    """The middleware around all routes.

    It checks access, traces, measures and logs each request, and turns exceptions into answers.
    """

    def __init__(
        self, app: ASGIApp, access: Access, service: PromptService, tracer: Tracer
    ) -> None:
        self._app = app
        self._access = access
        self._metrics = service.metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await no_request(scope, receive, send)
            return
        record = RequestRecord()
        scope["record"] = record
        with self._tracer.request(scope, record) as finish:
            status = await self._answer(scope, receive, send, record)
            finish(_route(scope), status)  # the router has set the scope's route by now

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> int:
        """Answer the request, count and log it, and return the status that was sent."""
        start, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        peer = scope["client"][0] if scope.get("client") else None
        try:
            record.key = self._access.check(scope["path"], Headers(scope=scope), peer)
            await self._app(scope, receive, noting)
        except ApiError as error:
            record.error = error.code
            await _response(error)(scope, receive, noting)
        except ClientDisconnect:
            status = HUNG_UP
        except asyncio.CancelledError:
            status = status or HUNG_UP
            raise
        except Exception:
            log.exception("%s %s failed", scope["method"], _route(scope))
            record.error = "internal_error"
            if not status:
                await _response(_internal())(scope, receive, noting)
        finally:
            seconds, route = time.perf_counter() - start, _route(scope)
            self._metrics.request(route, status or HUNG_UP, seconds, record.model)
            record.log(scope["method"], route, status or HUNG_UP, seconds, peer)
        return status or HUNG_UP


async def read_body(request: Request, limit: int) -> bytes:
    """Read the whole body; raise ApiError 413 as soon as it exceeds ``limit`` bytes."""
    too_large = ApiError(413, f"The body is larger than {limit} bytes", "body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await some work and return its result.

    If the client hangs up first, cancels the work and raises ClientDisconnect.
    """
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait([working, hanging_up], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, hanging_up):
            task.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Handler = Callable[[Request], Awaitable[Response]]


def _health(service: PromptService) -> Handler:
    async def health(request: Request) -> Response:
        if service.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failing"}, 503)

    return health


def _metrics(service: PromptService) -> Handler:
    async def show(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return show


def _openapi(api: FastAPI) -> Handler:
    async def openapi(request: Request) -> Response:
        return JSONResponse(api.openapi())

    return openapi


def _models(service: PromptService) -> Handler:
    async def models(request: Request) -> Response:
        return _json(service.models(_record(request)))

    return models


def _model(service: PromptService) -> Handler:
    async def model(request: Request) -> Response:
        work = service.model(request.path_params["model"], _record(request))
        return _json(await while_connected(request, work))

    return model


def _generate(service: PromptService, kind: type[CompletionRequest] | type[ChatRequest]) -> Handler:
    async def generate(request: Request) -> Response:
        body: Any = parse_body(kind, await read_body(request, service.limits.max_body_bytes))
        record = _record(request)
        if body.stream:
            chunks = await while_connected(request, service.stream(body, record))
            return StreamingResponse(
                _events(chunks, record), media_type="text/event-stream", headers=UNBUFFERED
            )
        ask = service.chat if kind is ChatRequest else service.complete
        return _json(await while_connected(request, ask(body, record)))

    return generate


def _answer(
    service: PromptService,
    kind: type[RequestType],
    ask: Callable[[PromptService, RequestType, RequestRecord], Awaitable[BaseModel]],
) -> Handler:
    """Return a handler that parses the body as ``kind`` and sends what ``ask`` answers."""

    async def answer(request: Request) -> Response:
        body = await read_body(request, service.limits.max_body_bytes)
        work = ask(service, parse_body(kind, body), _record(request))
        return _json(await while_connected(request, work))

    return answer


def _tokenizer_info(service: PromptService) -> Handler:
    async def info(request: Request) -> Response:
        return _json(service.tokenizer_info())

    return info


UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = "data: [DONE]\n\n"


async def _events(chunks: AsyncIterator[Chunk], record: RequestRecord) -> AsyncIterator[str]:
    """Yield the chunks as server-sent events.

    The HTTP status has been sent by then, so an error becomes an event, as OpenAI's clients expect.
    """
    async with aclosing(chunks):  # type: ignore[type-var]
        try:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json()}\n\n"
            yield DONE
        except ApiError as error:
            record.error = error.code
            yield f"data: {json.dumps(error.body())}\n\n"
        except Exception:
            log.exception("a streamed answer failed")
            record.error = "internal_error"
            yield f"data: {json.dumps(_internal().body())}\n\n"


def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["record"]
    return record


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _internal() -> ApiError:
    return ApiError(500, "Internal error; the server's log has the details", "internal_error")


async def no_request(scope: Scope, receive: Receive, send: Send) -> None:
    """Close a web socket, which is not supported, or acknowledge the ASGI lifespan events."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    while (message := await receive())["type"] in ("lifespan.startup", "lifespan.shutdown"):
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    _record(request).error = error.code
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer the framework's own errors, such as unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    texts = {
        404: (
            "There is no such route; GET /openapi.json describes those there are",
            "route_not_found",
        ),
        405: ("This route does not take that method", "method_not_allowed"),
    }
    message, code = texts.get(error.status_code, (str(error.detail), "http_error"))
    _record(request).error = code
    return _response(ApiError(error.status_code, message, code, headers=dict(error.headers or {})))


def _route(scope: Scope) -> str:
    """Return the pattern of the route that answered, or "other" for paths without a route."""
    return getattr(scope.get("route"), "path", "other")
