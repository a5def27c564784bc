"""Workarounds that rely on the internals of Ray's core. Checked on Ray 2.60."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestrator.utils.interrupts import sigterm_again

KEPT_S = 60  # seconds that a process stays idle before Ray ends it
ANSWER_S = 10.0
PYTHON = 0  # Ray's number for the language Python


@contextmanager
def sigterm_kept_at_shutdown() -> Iterator[None]:
    """Keep our handler of SIGTERM while ``ray.shutdown()`` runs in this block.

    Ray's C++ code resets SIGTERM to the system's default as it begins to shut down, whatever
    handled it before. Ending Ray's processes then takes another second, in which a second SIGTERM,
    as ``timeout`` sends it, would end this process without a message. So the handler is reinstalled
    in between, where Ray's node ends its processes, and afterwards.
    """
    node: Any = getattr(ray._private.worker, "_global_node", None)
    if node is not None:
        end = node.kill_all_processes

        def still_handled(*args: Any, **options: Any) -> Any:
            sigterm_again()
            return end(*args, **options)

        node.kill_all_processes = still_handled
    yield
    sigterm_again()


def prestart(processes: int) -> None:
    """Have Ray start Python processes until there are ``processes``, without waiting for them.

    Ray starts a process for each core by itself, and every other one only when it is requested.
    There is no public call, so this sends a message of the internal protocol between Ray's own
    processes. ``ray.nodes()`` must show one live node.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    missing = processes - int(node["Resources"].get("CPU", 0))
    if missing < 1:
        return
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = node_manager_pb2.PrestartWorkersRequest(
        language=PYTHON, job_id=job, keep_alive_duration_secs=KEPT_S, num_workers=missing
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(
            request, timeout=ANSWER_S
        )
