"""Ray for the length of a search: the cluster that is named, or one on this machine, started and stopped here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestrator.errors import BadInput, Unreachable
from orchestrator.leaving_ray import leave_ray
from orchestrator.search.placement import Node
from orchestrator.sigterm import sigterm_kept

ANSWER_S = 10.0  # a cluster that is there connects in milliseconds

# Read by Ray and its workers at their start. Ray's own loggers would write three files a trial.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt reaches our own code, which closes the MLflow runs
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a header even when asked for nothing
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a search's end waits for the next one; Train's own choice is 2
    # It ends a worker before its machine goes, without telling the broker, whose trials would wait for it. A machine
    # that is taken back is one that is lost: the trials go on elsewhere from their last report.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def ray_session(address: str | None = None, verbose: bool = False) -> Iterator[bool]:
    """Connect to ``address``, RAY_ADDRESS or a fresh local Ray; a session that is open already is used and left open.

    Says whether Ray's processes are ours, started here and for this. Raises Unreachable when a named cluster does not
    answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    logging.getLogger("ray").setLevel(options["logging_level"])
    if address:
        check_answers(address)
    try:
        with sigterm_kept():  # Ray's own handler would leave the MLflow runs open
            if address:
                ray.init(address=address, runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}, **options)
            else:
                ray.init(address="local", include_dashboard=False, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise no_cluster(address or "this machine", str(error).splitlines()[0]) from None
    try:
        yield not address
    finally:
        leave_ray()


def check_answers(address: str) -> None:
    """Raise Unreachable within seconds when nobody speaks gRPC at HOST:PORT; Ray itself would try for two minutes and
    then end the process. BadInput for a dashboard's address."""
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"{address} is a dashboard's address, to which jobs are submitted", "orchestrator submit JOB --address URL"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return  # auto, local, or a form that Ray refuses itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, getattr(error, "strerror", None) or str(error)) from None
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise no_cluster(address, "something listens there that is not Ray") from None


def no_cluster(address: str, reason: str) -> Unreachable:
    return Unreachable(
        f"no Ray cluster answers at {address}: {reason}",
        "check RAY_ADDRESS or --address (ray://HOST:10001 or HOST:6379), or leave it out to run on this machine",
    )


def nodes() -> list[Node]:
    """What the live nodes have, and at most what Ray may use of it."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
