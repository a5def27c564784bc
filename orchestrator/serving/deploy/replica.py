"""The classes that run in Ray Serve's processes: replicas and the front that retries requests.

Each replica is a complete server with its own store, engine and routes. This module does not
import Ray: ``app`` makes deployments of these classes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import device_for, load_backbone, set_threads
from orchestrator.models.source import resolve_model
from orchestrator.serving.deploy.options import ServeOptions
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.access import Access, ApiKey
from orchestrator.serving.http.metrics import Metrics
from orchestrator.serving.http.protocol import ApiError
from orchestrator.serving.http.request_record import log_to_standard_output
from orchestrator.serving.http.routes import make_api, no_request, read_body
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.http.tracing import tracer
from orchestrator.serving.prompts.store import PromptStore, RegistrySource

log = logging.getLogger(__name__)

MAX_TRIES = 3
KEPT = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)
"""The entries of an ASGI scope that can be sent to another process."""


class Replica:
    """A server process that loads the backbone by name and follows the registry by itself."""

    def __init__(
        self,
        options: ServeOptions,
        base: BaseModelSpec,
        source: RegistrySource,
        keys: tuple[ApiKey, ...],
    ) -> None:
        set_threads(options.cores)
        if options.access_log:
            log_to_standard_output()
        backbone = load_backbone(
            resolve_model(base), device_for(options.gpus or 0, "gpus"), base.dtype
        )
        metrics = Metrics()
        # On a CPU the model's memory and the host's are the same, so no second level is needed.
        host_bytes = 0 if backbone.device.type == "cpu" else options.host_prompt_bytes
        store = PromptStore(
            backbone, source, options.models, options.prompt_bytes, options.poll_seconds, host_bytes
        )
        store.start()
        engine = ServingEngine(backbone, options.limits, metrics.batch, metrics.first_token)
        self.service = PromptService(store, engine, options.request_limits, metrics)
        self.api = make_api(self.service, Access(keys), tracer())

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has died; Serve then replaces this replica."""
        if not self.service.healthy:
            raise RuntimeError("the engine's thread has ended")

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages that answer a request passed on by the front."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                # The body has been read. A client that hangs up cancels this generator.
                await asyncio.Event().wait()
            return unread.pop()

        async def run() -> None:
            try:
                await self.api(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        answering = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering


class Front:
    """An HTTP front that passes requests on to replicas.

    If a replica dies before its answer began, the front retries the request on another replica.
    """

    def __init__(
        self,
        answer: Callable[[Scope, bytes], AsyncIterator[Message]],
        keys: Sequence[ApiKey],
        max_body_bytes: int,
        died: type[Exception],
        busy: type[Exception],
    ) -> None:
        """Set the call that sends a request to a replica.

        ``answer`` raises ``died`` when the replica is gone, ``busy`` when too many requests wait.
        """
        self._answer = answer
        # The check here keeps clients without a valid key from sending a body. Replicas check again
        # and apply the keys' rate limits, so those are dropped here.
        self._access = Access([replace(key, per_minute=None) for key in keys])
        self._max_body_bytes = max_body_bytes
        self._died = died
        self._busy = busy

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check access, read the body, and answer an ASGI request through a replica."""
        if scope["type"] != "http":
            await no_request(scope, receive, send)
            return
        request_scope = {name: scope[name] for name in KEPT if name in scope}
        peer = scope["client"][0] if scope.get("client") else None
        try:
            self._access.check(scope["path"], Headers(scope=scope), peer)
            body = await read_body(Request(scope, receive), self._max_body_bytes)
            await self._try(request_scope, body, send)
        except self._busy:
            busy = ApiError(
                429,
                "The server is busy; try again",
                "server_overloaded",
                headers={"Retry-After": "1"},
            )
            await JSONResponse(busy.body(), busy.status, busy.headers)(scope, receive, send)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)

    async def _try(self, scope: Scope, body: bytes, send: Send) -> None:
        answer_started = False
        for attempt in range(MAX_TRIES):
            try:
                async for message in self._answer({**scope, "asgi": {"version": "3.0"}}, body):
                    answer_started = True
                    await send(message)
                return
            except self._died:
                if answer_started:
                    raise  # part of the answer has been sent, so a retry is not possible
                log.warning("a replica died before it answered; attempt %d", attempt + 2)
        raise ApiError(503, "No replica could answer", "unavailable", headers={"Retry-After": "5"})
