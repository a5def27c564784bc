"""Readings go from a worker to the broker without ever keeping a round waiting."""

from __future__ import annotations

from typing import Any, cast

import pytest
import ray

from orchestrator.search.workers import watch as watch_module
from orchestrator.search.workers.broker import BrokerHandle
from orchestrator.search.workers.watch import ReadingSender
from orchestrator.tuning.meter import Reading


def reading(done: int) -> Reading:
    return Reading("training", done, 10, 1.0, 1.0)


class SlowBroker:
    """The handle of a broker that answers when the test says so."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[int] = []
        self.answers = False
        self.failure: Exception | None = None
        patch.setattr(watch_module.ray, "wait", self.wait)

    @property
    def read(self) -> SlowBroker:
        return self

    def remote(self, worker: str, reading: Reading) -> int:
        if self.failure:
            raise self.failure
        self.sent.append(reading.done)
        return reading.done

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0
        return (calls, []) if self.answers else ([], calls)


def test_readings_are_dropped_while_the_broker_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one call is open, and the newest reading is sent once it was answered."""
    broker = SlowBroker(monkeypatch)
    send = ReadingSender("w0", cast(BrokerHandle, broker))
    for done in range(5):
        send(reading(done))
    assert broker.sent == [0]
    broker.answers = True
    send(reading(5))
    assert broker.sent == [0, 5]


def test_a_lost_broker_does_not_end_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker learns of it from its next call for orders."""
    broker = SlowBroker(monkeypatch)
    broker.failure = ray.exceptions.RayActorError()
    ReadingSender("w0", cast(BrokerHandle, broker))(reading(1))
    assert broker.sent == []
