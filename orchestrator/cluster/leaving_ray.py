"""The end of a Ray that was started here."""

from __future__ import annotations

import logging
from typing import Any

import ray

from orchestrator.cluster.ray_threads import await_ray_threads, names
from orchestrator.utils.imports import uncollected
from orchestrator.utils.signals import sigterm_again

log = logging.getLogger(__name__)

THREADS_S = 10.0
"""The last wait for threads that call Ray; who started them has waited before, and ended what they wait for."""


def leave_ray() -> None:
    """Call ``ray.shutdown()`` once no thread calls Ray any more; a second SIGTERM does not cut it short.

    With a thread that does not end Ray is left as it is, for ``end_process``.

    As Ray's C++ goes it gives SIGTERM back to the system, whatever handled it; ending Ray's processes then takes a
    second more, in which the signal would end this one without a word. Garbage is not collected meanwhile: another
    thread that came upon a reference to one of Ray's objects would call its C++ as it goes.
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
