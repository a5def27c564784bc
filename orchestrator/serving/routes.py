"""The HTTP routes, as a FastAPI application over a PromptService: no Ray, no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.access import Access
from orchestrator.serving.metrics import CONTENT_TYPE, Metrics
from orchestrator.serving.protocol import ApiError, ClassifyRequest, CompletionRequest, parse_body
from orchestrator.serving.service import PromptService

log = logging.getLogger(__name__)


def make_api(service: PromptService, access: Access | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application. Every answer but /metrics is JSON, every error has OpenAI's shape."""
    metrics = metrics or Metrics()
    # No documentation pages: they would be open routes, and load scripts from elsewhere.
    api = FastAPI(title="prompt-orchestrator", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_middleware(Gate, access=access or Access(), metrics=metrics)
    api.add_api_route("/health", _health(service), methods=["GET"])
    api.add_api_route("/metrics", _metrics(metrics), methods=["GET"])
    api.add_api_route("/v1/models", _models(service), methods=["GET"])
    api.add_api_route("/v1/models/{model:path}", _model(service), methods=["GET"])
    api.add_api_route("/v1/completions", _completions(service), methods=["POST"])
    api.add_api_route("/classify", _classify(service), methods=["POST"])
    metrics.gauge("orchestrator_waiting_rows", "Rows that no batch has taken yet", lambda: service.engine.waiting)
    metrics.gauge("orchestrator_loaded_prompts", "Prompts in memory", lambda: service.store.loaded_count)
    metrics.gauge("orchestrator_loaded_prompt_bytes", "Their keys and values", lambda: service.store.loaded_bytes)
    return api


class Gate:
    """Around all routes: who may ask, how long it took, and no exception that reaches the client."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._access.check(scope["path"], Headers(scope=scope))
            await self._app(scope, receive, noting)
        except ApiError as error:
            await _response(error)(scope, receive, noting)
        except ClientDisconnect:
            status = 499
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await _response(_internal())(scope, receive, noting)
        finally:
            self._metrics.request(_route(scope), status or 499, time.perf_counter() - start)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; ApiError 413 as soon as it is longer than ``limit`` bytes."""
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


Handler = Callable[[Request], Awaitable[Response]]


def _health(service: PromptService) -> Handler:
    async def health(request: Request) -> Response:
        if service.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failing"}, 503)

    return health


def _metrics(metrics: Metrics) -> Handler:
    async def show(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return show


def _models(service: PromptService) -> Handler:
    async def models(request: Request) -> Response:
        return _json(service.models())

    return models


def _model(service: PromptService) -> Handler:
    async def model(request: Request) -> Response:
        return _json(service.model(request.path_params["model"]))

    return model


def _completions(service: PromptService) -> Handler:
    async def completions(request: Request) -> Response:
        body = await read_body(request, service.limits.max_body_bytes)
        return _json(await service.complete(parse_body(CompletionRequest, body)))

    return completions


def _classify(service: PromptService) -> Handler:
    async def classify(request: Request) -> Response:
        body = await read_body(request, service.limits.max_body_bytes)
        return _json(await service.classify(parse_body(ClassifyRequest, body)))

    return classify


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _internal() -> ApiError:
    return ApiError(500, "Internal error; the server's log has the details", "internal_error")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses itself: unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    texts = {
        404: ("There is no such route; see GET /v1/models, POST /v1/completions, POST /classify", "route_not_found"),
        405: ("This route does not take that method", "method_not_allowed"),
    }
    message, code = texts.get(error.status_code, (str(error.detail), "http_error"))
    return _response(ApiError(error.status_code, message, code, headers=dict(error.headers or {})))


def _route(scope: Scope) -> str:
    """The pattern of the route that answered; one name for all paths that have none."""
    return getattr(scope.get("route"), "path", "other")
