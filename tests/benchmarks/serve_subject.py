"""The benchmark's server behind Ray Serve: proxy, one replica process, and optionally the front."""

from __future__ import annotations

# This import comes before torch and Ray, since it sets their environment variables.
from orchestrator.serving.app import DEPLOYMENT, FrontReplica

# isort: split
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from orchestrator.serving.deploy.replica import Replica
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.service import RequestLimits
from tests.benchmarks.serving_subject import NullEngine, ours


class Subject(Replica):
    """A replica with random prompts, with or without an engine."""

    def __init__(self, size: str, folder: str, null: bool) -> None:
        torch.set_num_threads(1)
        self.api = ours(size, Path(folder), NullEngine if null else ServingEngine)

    def check_health(self) -> None:
        """Report the replica as always healthy."""


@serve.deployment(name="prompts", **DEPLOYMENT)
@serve.ingress()
class Answering(Subject):
    """A replica that answers HTTP itself."""

    def __serve_build_asgi_app__(self) -> Any:
        return self.api


@serve.deployment(name="prompts", **DEPLOYMENT)
class Hidden(Subject):
    """A replica behind the front."""


def main(kind: str, size: str, folder: str, port: int) -> None:
    """Serve until SIGTERM.

    ``kind`` is ``serve`` or ``front``, a hyphen, and ``ours`` or ``null``.
    """
    place, engine = kind.split("-")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        num_cpus=4,
    )
    deployment: Any = Answering if place == "serve" else Hidden
    app = deployment.bind(size, folder, engine == "null")
    if place == "front":
        front: Any = FrontReplica.options(ray_actor_options={"num_cpus": 0})  # type: ignore[attr-defined]
        app = front.bind(app, (), RequestLimits().max_body_bytes)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=quiet)
    serve.run(app, route_prefix="/", logging_config=quiet)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    ray.shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
