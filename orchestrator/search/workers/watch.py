"""Progress within a round on its way from the workers to the display."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray

from orchestrator.cluster import actors
from orchestrator.cluster.actors import Reference
from orchestrator.cluster.ray_threads import RayThread, await_end
from orchestrator.search.workers.broker import BrokerHandle
from orchestrator.tuning.meter import Reading
from orchestrator.utils.interrupts import undisturbed

log = logging.getLogger(__name__)

LOOK_S = 2.0
ANSWER_S = 2.0  # longest wait for the broker's answer
END_S = 5.0  # longest wait for the end of the thread


class ReadingSender:
    """Sends a worker's readings to the broker and waits for no answer.

    A reading is dropped while the broker has not answered the one before, so that calls can't queue
    up. Rounds go on whatever happens to readings.
    """

    def __init__(self, worker: str, broker: BrokerHandle) -> None:
        self._worker = worker
        self._broker = broker
        self._sent: Reference[None] | None = None

    def __call__(self, reading: Reading) -> None:
        try:
            if self._sent is None or self._answered(self._sent):
                self._sent = self._broker.read.remote(self._worker, reading)
        except ray.exceptions.RayError as error:
            log.debug("the progress of a round can't be sent: %s", error)

    @staticmethod
    def _answered(sent: Reference[None]) -> bool:
        return bool(ray.wait([sent], timeout=0)[0])


class Watch(RayThread):
    """A thread of the driver that shows the workers' readings until ``stop`` is called."""

    def __init__(self, broker: BrokerHandle, show: Callable[[Mapping[str, Reading]], None]) -> None:
        super().__init__("search-watch")
        self._broker = broker
        self._show = show
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                readings = actors.get(self._broker.readings.remote(), timeout=ANSWER_S)
            except Exception as error:
                # The broker is busy or gone; the study's own calls handle that.
                log.debug("the progress of rounds can't be read: %s", error)
                continue
            if not self._over.is_set():
                self._show(readings)

    def stop(self) -> None:
        self._over.set()
        await_end([self], END_S)


@contextmanager
def watching(broker: BrokerHandle, show: Callable[[Mapping[str, Reading]], None]) -> Iterator[None]:
    """Show the workers' readings while the block runs."""
    watch = Watch(broker, show)
    try:
        with undisturbed():
            watch.start()
        yield
    finally:
        with undisturbed():
            watch.stop()
