"""Traces, as a real OTLP endpoint on loopback receives them."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_serving_routes import Client

from orchestrator.errors import BadInput
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.http.tracing import NoTracer, SpanTracer, tracer

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(HTTPServer):
    """An HTTP server that keeps the spans posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.server.services.add(named["service.name"])
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_span_a_request(collector: Collector, service: PromptService) -> None:
    """A span below the caller's has route, status, model, version and tokens.

    It has nothing that the client wrote.
    """
    traced = tracer()
    assert isinstance(traced, SpanTracer)
    client = Client(service, tracer=traced)
    body = {"model": "story", "prompt": "a secret", "max_tokens": 4, "temperature": 0}
    answered = client.post("/v1/completions", body, headers={"traceparent": CALLER})
    refused = client.post("/v1/completions", {**body, "model": "<script>"})
    client.get("/nowhere?token=hidden")
    traced.flush()

    assert collector.services == {"orchestrator"}
    first, second, third = collector.spans
    usage = answered.json()["usage"]
    assert attributes(first) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "story",
        "orchestrator.model.version": 1,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "orchestrator.request.id": answered.headers["x-request-id"],
    }
    assert first.name == "POST /v1/completions"
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == tuple(CALLER.split("-")[1:3])
    assert refused.status_code == 404
    assert attributes(second)["error.type"] == "model_not_found"
    assert third.name == "GET other"
    for span in collector.spans:
        assert not {"a secret", "<script>", "hidden", "nowhere"} & set(
            json.dumps(attributes(span)).split('"')
        )


def test_a_stream_is_one_span(service: PromptService) -> None:
    """The span ends with the stream, and has the number of its tokens."""
    kept = InMemorySpanExporter()
    traced = SpanTracer(kept)
    client = Client(service, tracer=traced)
    client.post(
        "/v1/completions",
        {"model": "story", "prompt": "a", "max_tokens": 4, "temperature": 0, "stream": True},
    )
    traced.flush()
    (span,) = kept.get_finished_spans()
    assert span.attributes is not None
    assert 1 <= int(str(span.attributes["gen_ai.usage.output_tokens"])) <= 4


def test_off_by_default_and_refused_when_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable nothing is traced.

    Unknown exporters, and exporters that are not installed, are refused.
    """
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    assert isinstance(tracer(), NoTracer)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(BadInput, match="zipkin"):
        tracer()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadInput, match="not installed") as refused:
        tracer()
    assert "prompt-orchestrator[tracing]" in str(refused.value)
