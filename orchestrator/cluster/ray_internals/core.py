"""Workarounds that rely on the internals of Ray's core. Checked on Ray 2.60."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import ray

HANDLERS_INSTALLED = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"
KEPT_S = 60  # seconds that a process stays idle before Ray ends it
ANSWER_S = 10.0
PYTHON = 0  # Ray's number for the language Python


@contextmanager
def no_signal_handlers() -> Iterator[None]:
    """Keep Ray's C++ code from handling signals in a process that calls ``ray.init`` in this block.

    Its handler of SIGTERM prints a stack trace before ours is called. As Ray shuts down, it resets
    SIGTERM to the system's default, and another SIGTERM, as ``timeout`` sends it, would end the
    process without a message. A flag says whether the handlers are installed: they are not if it is
    set while Ray starts, and nothing is reset if it is not set while Ray shuts down.
    """
    try:
        installed = ctypes.c_bool.in_dll(ctypes.CDLL(ray._raylet.__file__), HANDLERS_INSTALLED)
    except (OSError, ValueError):  # another version of Ray
        yield
        return
    installed.value = True
    try:
        yield
    finally:
        installed.value = False


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
