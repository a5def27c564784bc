"""What runs in Serve's processes: replicas, each a whole server (store, engine, routes), and the front that retries.

No Ray here: ``app`` makes deployments of these classes.
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
from orchestrator.serving.engine.engine import Engine
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
"""What a scope has that another process can use."""


class Replica:
    """Loads the backbone itself, by name, and follows the registry on its own."""

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
        host_bytes = (
            0 if backbone.device.type == "cpu" else options.host_prompt_bytes
        )  # the same memory
        store = PromptStore(
            backbone, source, options.models, options.prompt_bytes, options.poll_seconds, host_bytes
        )
        store.start()
        engine = Engine(backbone, options.limits, metrics.batch, metrics.first_token)
        self.service = PromptService(store, engine, options.request_limits, metrics)
        self.api = make_api(self.service, Access(keys), tracer())

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has died."""
        if not self.service.healthy:
            raise RuntimeError("the engine's thread has ended")

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The application's messages for a request that the front took."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not asked:
                await asyncio.Event().wait()  # who hangs up cancels
            return asked.pop()

        async def run() -> None:
            try:
                await self.api(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


class Front:
    """Passes requests on to replicas, and on to another one when a replica dies before its answer began."""

    def __init__(
        self,
        answer: Callable[[Scope, bytes], AsyncIterator[Message]],
        keys: Sequence[ApiKey],
        max_body_bytes: int,
        died: type[Exception],
        busy: type[Exception],
    ) -> None:
        """``answer`` asks some replica; it raises ``died`` when that is gone, ``busy`` when too many wait."""
        self._answer = answer
        # Replicas check again, and count what a key asks; here nobody without one gets to send a body.
        self._access = Access([replace(key, per_minute=None) for key in keys])
        self._max_body_bytes = max_body_bytes
        self._died = died
        self._busy = busy

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await no_request(scope, receive, send)
            return
        kept = {name: scope[name] for name in KEPT if name in scope}
        peer = scope["client"][0] if scope.get("client") else None
        try:
            self._access.check(scope["path"], Headers(scope=scope), peer)
            body = await read_body(Request(scope, receive), self._max_body_bytes)
            await self._try(kept, body, send)
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
        begun = False
        for tried in range(MAX_TRIES):
            try:
                async for message in self._answer({**scope, "asgi": {"version": "3.0"}}, body):
                    begun = True
                    await send(message)
                return
            except self._died:
                if begun:
                    raise  # what was sent can't be taken back
                log.warning("a replica died before it answered; attempt %d", tried + 2)
        raise ApiError(503, "No replica could answer", "unavailable", headers={"Retry-After": "5"})
