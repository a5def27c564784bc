"""Environment variables and loggers of Ray.

Ray reads the variables when it starts, so they must be set before ``ray.init``. They are defaults:
a value that the user has set is kept. Ray documents most of them; a comment marks the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PRELOADED = "RAY_preload_python_modules"
NICENESS = "RAY_worker_niceness"

SEARCH = {
    # Tune's own loggers would write three files a trial.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # An interrupt must reach our own code, which closes the MLflow runs.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a header even when it is silenced
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # The end of a search waits for the next health check. Train's default is 2.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The watcher ends a worker before its machine is preempted, without telling the broker, whose
    # trials would wait for it. We treat a preempted machine as lost: its trials continue elsewhere
    # from their last report.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # undocumented; Train sets this for its controller
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""The settings of a search, which Ray and its workers read at their start."""

SERVING = {
    # Undocumented. Check the proxies every second instead of every ten, so that a dead proxy is
    # replaced sooner. Serve's controller reads this variable when it starts.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Undocumented. With HAProxy in front: let it retry a request that a replica accepted but did
    # not answer. Retrying is safe because answering a request changes no state.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Undocumented. Replicas get their share of the cores beside other work; Ray's default is 15.
    NICENESS: "0",
}
"""The settings of a server."""


def set_defaults(settings: Mapping[str, str]) -> None:
    """Put the settings into this process's environment, except those that are set already."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def preload(module: str) -> None:
    """Have each Python process of a Ray that is started from here import the module as it starts.

    The variable is undocumented: it sets the entry ``preload_python_modules`` of Ray's
    configuration. Without it, a search's processes import Train and Tune one after another when
    they are needed.
    """
    set_defaults({PRELOADED: module})


@contextmanager
def worker_niceness(niceness: int) -> Iterator[None]:
    """Set the niceness of the worker processes of a Ray that is started within the context.

    The variable is undocumented: it sets the entry ``worker_niceness`` of Ray's configuration,
    whose default of 15 leaves workers what other processes do not take. Ray reads it once, as it
    starts. A value that the user has set is kept.
    """
    if NICENESS in os.environ:
        yield
        return
    os.environ[NICENESS] = str(niceness)
    try:
        yield
    finally:
        os.environ.pop(NICENESS, None)


def quiet_search_loggers() -> None:
    """Silence the loggers of Train below errors, and Tune's altogether.

    They log every restart and every report; our own progress display shows what matters. Tune logs
    a traceback for each trial that a failed worker ends; our own message names the cause once.
    """
    for name in ("ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def quiet_serve_logger() -> None:
    """Silence Serve's logger below warnings: it logs each step of a deployment."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def quiet_job_loggers() -> None:
    """Silence the loggers of Ray's job client below warnings: they log each file of a package."""
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
