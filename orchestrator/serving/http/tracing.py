"""Traces through OpenTelemetry: a span a request, with what its record says. Off unless OTEL_TRACES_EXPORTER is set.

Endpoint, headers, sampling and service name are OpenTelemetry's own environment variables. Names of attributes are its
semantic conventions for HTTP and for generative models. No attribute holds a text that the client sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import BadInput
from orchestrator.serving.http.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import Scope

VARIABLE = "OTEL_TRACES_EXPORTER"
SERVICE = "orchestrator"
ALLOWED = ("otlp", "console", "none")


class Tracer(Protocol):
    """What the routes know of traces."""

    def request(self, scope: Scope, record: RequestRecord) -> Any:
        """A context around one request; it yields what is called with route and status at the end."""


class NoTracer:
    """Traces nothing."""

    @contextmanager
    def request(self, scope: Scope, record: RequestRecord) -> Iterator[Any]:
        yield lambda route, status: None


class SpanTracer:
    """A span for each request, a child of the caller's where its ``traceparent`` says so."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: SERVICE}
        # A provider of its own: Ray and MLflow may have set the process's.
        self._provider = TracerProvider(resource=Resource.create(named))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("orchestrator.serving")

    @contextmanager
    def request(self, scope: Scope, record: RequestRecord) -> Iterator[Any]:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(scope["method"], parent, kind=SpanKind.SERVER)

        def finish(route: str, status: int) -> None:
            span.update_name(f"{scope['method']} {route}")
            found = {
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                "gen_ai.request.model": record.model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "orchestrator.model.version": record.version,
                "orchestrator.request.id": record.id,
                "error.type": record.error,
            }
            span.set_attributes(
                {name: value for name, value in found.items() if value not in (None, "")}
            )
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.error))

        try:
            yield finish
        finally:
            span.end()

    def flush(self) -> None:
        """Send what is waiting to be sent."""
        self._provider.force_flush()


def tracer() -> Tracer:
    """As the environment asks. BadInput for an exporter that is unknown or not installed."""
    exporter = asked_exporter()
    return NoTracer() if exporter is None else SpanTracer(exporter())


def asked_exporter() -> Callable[[], SpanExporter] | None:
    """The exporter that the environment names, or None; checked, and not made yet. BadInput as ``tracer``."""
    name = os.environ.get(VARIABLE, "none").strip().lower() or "none"
    if name not in ALLOWED:
        raise BadInput(f"{VARIABLE} is {name!r}", f"allowed: {', '.join(ALLOWED)}")
    if name == "none":
        return None
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise BadInput(
            f"{VARIABLE} is otlp, and opentelemetry-exporter-otlp-proto-http is not installed",
            "pip install 'prompt-orchestrator[tracing]'",
        ) from None
    return OTLPSpanExporter
