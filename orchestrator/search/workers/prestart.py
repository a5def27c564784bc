"""Processes that are started early for a search's worker, in a Ray that was started here.

A search needs a chain of Ray processes, each requested by the one before it. Each process imports
what Train or Tune need. Ray's processes import this module as they start, and with it those
libraries. They are made here while the driver reads data and model, which keeps one core busy, and
Ray hands them out when they are requested. The processes of trials are not made early: they start
while the worker loads the model, and earlier they would delay it.
"""

from __future__ import annotations

from orchestrator.utils.imports import uncollected

with uncollected():
    import ray

    import orchestrator.search.study.study
    import orchestrator.search.workers.train_group  # noqa: F401

PROCESSES = 4  # the broker, Train's controller, its actor that keeps reports, and the worker
KEPT_S = 60  # seconds that a process stays idle before Ray ends it
ANSWER_S = 10.0
PYTHON = 0  # Ray's number for the language Python


def make_ready() -> None:
    """Have Ray start the processes that are missing; returns without waiting for them.

    Ray starts a process for each core by itself.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    missing = PROCESSES - int(node["Resources"].get("CPU", 0))
    if missing < 1:
        return
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    asked = node_manager_pb2.PrestartWorkersRequest(
        language=PYTHON, job_id=job, keep_alive_duration_secs=KEPT_S, num_workers=missing
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(
            asked, timeout=ANSWER_S
        )
