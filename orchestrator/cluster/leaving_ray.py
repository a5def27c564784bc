"""Shutting down a Ray that this process started or joined."""

from __future__ import annotations

import logging
from typing import Any

import ray

from orchestrator.cluster.ray_threads import await_ray_threads, names
from orchestrator.utils.imports import uncollected
from orchestrator.utils.signals import sigterm_again

log = logging.getLogger(__name__)

THREADS_S = 10.0
"""The time to wait for threads that call Ray.

The code that started them has waited for them before, and has ended what they wait for.
"""


def leave_ray() -> None:
    """Call ``ray.shutdown()`` once no thread calls Ray any more.

    If a thread does not end, Ray is left running for ``end_process``.

    A second SIGTERM does not interrupt the shutdown. While Ray's C++ code shuts down, it resets
    SIGTERM to the system's default, whatever handled it before. Ending Ray's processes then takes
    another second, in which the signal would end this process without a message. So our handler is
    reinstalled in between. Garbage collection is off during the shutdown: another thread that
    collected a reference to one of Ray's objects would call the C++ code while it shuts down.
    """
    if stuck := await_ray_threads(THREADS_S):
        log.warning("Ray is not shut down, because it is still called by: %s", names(stuck))
        return
    node: Any = getattr(ray._private.worker, "_global_node", None)
    if node is not None:
        end = node.kill_all_processes

        def still_handled(*args: Any, **options: Any) -> Any:
            sigterm_again()
            return end(*args, **options)

        node.kill_all_processes = still_handled
    with uncollected():
        ray.shutdown()
    sigterm_again()
