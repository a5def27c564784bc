"""The threads of this process that call Ray. Ray is shut down once all of them have ended, and not before.

A thread that calls Ray after ``ray.shutdown`` makes its C++ end the whole process, with exit code 1 and without our
message, or crash it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

log = logging.getLogger(__name__)

_started: list[threading.Thread] = []
_starting = threading.Lock()


class RayThread(threading.Thread):
    """A thread that calls Ray."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)

    def start(self) -> None:
        """Start, and be counted among the threads that Ray's end waits for."""
        with _starting:
            _started[:] = alive(_started)
            _started.append(self)
            super().start()


def alive(threads: Sequence[threading.Thread]) -> list[threading.Thread]:
    """The threads that were started and have not ended."""
    return [thread for thread in threads if thread.is_alive()]


def await_end(threads: Sequence[threading.Thread], seconds: float) -> list[threading.Thread]:
    """Wait for the threads' end, no longer than ``seconds`` in all; return those that still live."""
    deadline = time.monotonic() + seconds
    for thread in alive(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return alive(threads)


def await_ray_threads(seconds: float) -> list[threading.Thread]:
    """Wait as ``await_end`` does, for every thread that calls Ray."""
    return await_end(_started, seconds)


def names(threads: Sequence[threading.Thread]) -> str:
    """The threads' names, for a message."""
    return ", ".join(thread.name for thread in threads)


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, also where a thread is stuck in a call of Ray.

    Such a thread would be crashed by what Ray does at a program's end. So nothing is done there: the processes that
    this one started are ended by their id, and the system frees the rest.
    """
    stuck = alive(_started)
    if not stuck:
        sys.exit(code)
    log.warning("ending without a thread that is stuck in a call of Ray: %s", names(stuck))
    sys.stdout.flush()
    sys.stderr.flush()
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            log.debug("process %d has ended", child.pid)
    os._exit(code)
