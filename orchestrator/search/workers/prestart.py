"""Processes that wait ready for a search's worker, in a Ray that was started here.

A search asks Ray for processes one after another, each made by the one before it, and each imports what Train or Tune
need: this module, which Ray's processes import as they start. Here they are made while the driver reads data and model,
which is one core's work, and Ray hands them out as they are asked for. The trials' are not: they begin while the worker
loads the model, and made sooner they would hold it up.
"""

from __future__ import annotations

from orchestrator.utils.imports import uncollected

with uncollected():
    import ray

    import orchestrator.search.study.study
    import orchestrator.search.workers.train_group  # noqa: F401

PROCESSES = 4  # the broker, Train's controller, where that keeps reports, and the worker
KEPT_S = 60  # how long one waits to be asked for
ANSWER_S = 10.0
PYTHON = 0  # among the languages that Ray knows


def make_ready() -> None:
    """Have Ray make the processes, besides one for each core, which it makes by itself. Returns at once."""
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
