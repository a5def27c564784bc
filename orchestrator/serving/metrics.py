"""Prometheus metrics of one serving process. No label ever holds what a client sent."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of their own registry, so that several servers may live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "orchestrator_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "orchestrator_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=self._registry
        )
        self._rows = Histogram(
            "orchestrator_batch_rows", "Rows in a forward", ["kind"], buckets=ROWS, registry=self._registry
        )

    def batch(self, kind: str, rows: int) -> None:
        """One forward of the engine."""
        self._rows.labels(kind).observe(rows)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One answered request; ``route`` is the route's pattern, not the path that was asked for."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A value that is read when somebody asks."""
        Gauge(name, help_text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        exposition: bytes = generate_latest(self._registry)
        return exposition
