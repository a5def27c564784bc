"""The end of a Ray that was started here."""

from __future__ import annotations

from typing import Any

import ray

from orchestrator.sigterm import sigterm_again


def leave_ray() -> None:
    """``ray.shutdown()``, which a second SIGTERM does not cut short.

    As Ray's C++ goes it gives SIGTERM back to the system, whatever handled it; ending Ray's processes then takes a
    second more, in which the signal would end this one without a word.
    """
    node: Any = getattr(ray._private.worker, "_global_node", None)
    if node is not None:
        end = node.kill_all_processes

        def still_handled(*args: Any, **options: Any) -> Any:
            sigterm_again()
            return end(*args, **options)

        node.kill_all_processes = still_handled
    ray.shutdown()
    sigterm_again()
