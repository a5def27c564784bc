"""The threads of this process that call Ray.

Ray is only shut down once all of them have ended. If a thread calls Ray after ``ray.shutdown``,
Ray's C++ code crashes the whole process, or ends it with exit code 1 and without our message.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from orchestrator.utils.ending import end_process, flush_output

log = logging.getLogger(__name__)

_started: list[threading.Thread] = []
_starting = threading.Lock()


class RayThread(threading.Thread):
    """A thread that calls Ray."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, and add it to the threads that Ray's shutdown waits for."""
        with _starting:
            _started[:] = alive(_started)
            _started.append(self)
            super().start()


def alive(threads: Sequence[threading.Thread]) -> list[threading.Thread]:
    """Return the threads that were started and have not ended."""
    return [thread for thread in threads if thread.is_alive()]


def await_end(threads: Sequence[threading.Thread], seconds: float) -> list[threading.Thread]:
    """Wait at most ``seconds`` in all for the threads to end; return those still alive."""
    deadline = time.monotonic() + seconds
    for thread in alive(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return alive(threads)


def await_ray_threads(seconds: float) -> list[threading.Thread]:
    """Wait as ``await_end`` does, for every thread that calls Ray."""
    return await_end(_started, seconds)


def names(threads: Sequence[threading.Thread]) -> str:
    """List the threads' names for a message."""
    return ", ".join(thread.name for thread in threads)


def end_ray_process(code: int) -> NoReturn:
    """End the process with this exit code, even if a thread is stuck in a call of Ray.

    Ray's cleanup at a normal exit would crash such a thread. So no cleanup is run: the processes
    that this one started are killed by their IDs, and the system frees the rest.
    """
    stuck = alive(_started)
    if not stuck:
        end_process(code)
    log.warning(
        "exiting without waiting for threads that are stuck in a call of Ray: %s", names(stuck)
    )
    flush_output()
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            log.debug("process %d has ended", child.pid)
    os._exit(code)
