"""OpenTelemetry traces: one span per request, with the attributes of its ``RequestRecord``.

Tracing is off unless OTEL_TRACES_EXPORTER is set. OpenTelemetry's own environment variables set the
endpoint, headers, sampling and service name. Attributes are named by OpenTelemetry's semantic
conventions for HTTP and for generative models. No attribute contains text that the client sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

from orchestrator.errors import BadInput
from orchestrator.serving.http.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import Scope

Finish: TypeAlias = Callable[[str, int], None]
"""A function that is called at the end of a request with the route's pattern and the status."""

VARIABLE = "OTEL_TRACES_EXPORTER"
SERVICE = "orchestrator"
ALLOWED = ("otlp", "console", "none")


class Tracer(Protocol):
    """The interface through which the routes record traces."""

    def request(self, scope: Scope, record: RequestRecord) -> AbstractContextManager[Finish]:
        """Return a context manager for one request, which yields the function that ends it."""


class NoTracer:
    """A tracer that records nothing, used when tracing is off."""

    @contextmanager
    def request(self, scope: Scope, record: RequestRecord) -> Iterator[Finish]:
        """Yield a function that does nothing."""
        yield lambda route, status: None


class SpanTracer:
    """A tracer that records one span per request.

    If the request has a ``traceparent`` header, the span is a child of the caller's span.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        attributes = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: SERVICE}
        # Use a separate provider: Ray or MLflow may have set the process's global one.
        self._provider = TracerProvider(resource=Resource.create(attributes))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("orchestrator.serving")

    @contextmanager
    def request(self, scope: Scope, record: RequestRecord) -> Iterator[Finish]:
        """Open a span; yield the function that sets its name, attributes and status."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(scope["method"], parent, kind=SpanKind.SERVER)

        def finish(route: str, status: int) -> None:
            span.update_name(f"{scope['method']} {route}")
            attributes = {
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
                {name: value for name, value in attributes.items() if value not in (None, "")}
            )
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.error))

        try:
            yield finish
        finally:
            span.end()

    def flush(self) -> None:
        """Export all finished spans now."""
        self._provider.force_flush()


def tracer() -> Tracer:
    """Create the tracer that OTEL_TRACES_EXPORTER selects.

    Raises BadInput for an exporter that is unknown or not installed.
    """
    exporter = asked_exporter()
    return NoTracer() if exporter is None else SpanTracer(exporter())


def asked_exporter() -> Callable[[], SpanExporter] | None:
    """Return the class of the exporter that OTEL_TRACES_EXPORTER selects; None if tracing is off.

    Raises BadInput for an exporter that is unknown or not installed.
    """
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
