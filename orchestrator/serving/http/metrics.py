"""Prometheus metrics of one serving process.

No label contains text that a client sent: model labels are the registry's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from orchestrator.serving.prompts.store import PromptStore

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
COUNTS = {
    "hits": "Requests whose prompt was beside the model",
    "loads": "Prompts read from the registry",
    "returns": "Prompts brought back from the host's memory",
    "evictions": "Prompts that left the model's memory for others",
    "refusals": "Versions that could not be served",
}


class Metrics:
    """The metrics of one server, in a collector registry of their own.

    Separate registries allow several servers in one process.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered", "route", "model", "status")
        self._tokens = self._counter("tokens", "Tokens of inputs and answers", "model", "kind")
        self._seconds = self._histogram(
            "request_seconds", "Time to answer", SECONDS, "route", "model"
        )
        self._first = self._histogram(
            "first_token_seconds", "Time to a row's first token", SECONDS, "model"
        )
        self._rows = self._histogram("batch_rows", "Rows in a forward", ROWS, "kind")

    def batch(self, kind: str, rows: int) -> None:
        """Count the rows of one forward of the engine."""
        self._rows.labels(kind).observe(rows)

    def request(self, route: str, status: int, seconds: float, model: str = "") -> None:
        """Count one answered request and its time.

        ``route`` is the route's pattern; ``model`` is the registered name, or empty.
        """
        self._requests.labels(route, model, str(status)).inc()
        self._seconds.labels(route, model).observe(seconds)

    def tokens(self, model: str, prompt: int, completion: int) -> None:
        """Count the prompt and completion tokens of one request."""
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "completion").inc(completion)

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time from a row's arrival to its first token."""
        self._first.labels(model).observe(seconds)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever the metrics are collected."""
        Gauge(name, help_text, registry=self._registry).set_function(read)

    def watch(self, store: PromptStore) -> None:
        """Add the store's counters, the versions that answer and the refused versions."""
        self._registry.register(StoreCollector(store))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        exposition: bytes = generate_latest(self._registry)
        return exposition

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"orchestrator_{name}", text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"orchestrator_{name}", text, labels, buckets=buckets, registry=self._registry
        )


class StoreCollector(Collector):
    """A collector that reads the prompt store's state whenever the metrics are collected."""

    def __init__(self, store: PromptStore) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        """Yield the store's counters, the versions that answer and the refused versions."""
        counts = dict(self._store.counts)
        for kind, text in COUNTS.items():
            family = CounterMetricFamily(f"orchestrator_prompt_{kind}", text, labels=["model"])
            for (counted, model), number in counts.items():
                if counted == kind:
                    family.add_metric([model], number)
            yield family
        live = GaugeMetricFamily(
            "orchestrator_version", "The version that answers", labels=["model", "alias"]
        )
        for (model, alias), version in self._store.versions().items():
            live.add_metric([model, alias], version)
        yield live
        refused = GaugeMetricFamily(
            "orchestrator_refused_version",
            "An alias asks for it and it can't be served",
            labels=["model", "version"],
        )
        for model, version in self._store.refused():
            refused.add_metric([model, str(version)], 1)
        yield refused
