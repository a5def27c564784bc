"""Seconds from a promotion to its first answer, and from a server's start to its first answer.

The server is ``orchestrator serve`` itself, with a registry on disk.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchestrator.artifact import BaseModelRecord, PromptArtifact
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.registry import Registry
from tests.benchmarks.jobs import random_model
from tests.benchmarks.measure import Line
from tests.benchmarks.serving import START_S, free_port
from tests.benchmarks.serving_subject import save_prompts

NAME = "prompt"
VERSIONS = 2
ASKED_EVERY_S = 0.01


def live_lines(size: str, promotions: int, starts: int) -> list[Line]:
    """Return a line for promotions on one server, and a line for server starts."""
    with tempfile.TemporaryDirectory(prefix="live-") as scratch:
        registry = _registry(Path(scratch), size)
        begun, moved = [], []
        for number in range(starts):
            with _serving(registry, Path(scratch)) as (url, seconds):
                begun.append(seconds)
                moved += _promotions(registry, url, promotions if number == 0 else 0)
    promoted = {
        "median, s": statistics.median(moved),
        "most, s": max(moved),
        "promotions": float(len(moved)),
    }
    started = {"median, s": statistics.median(begun), "most, s": max(begun)}
    return [
        Line("from a promotion to its first answer", promoted, {"seconds": moved}),
        Line("from the command to the first answer", started, {"seconds": begun}),
    ]


def _registry(folder: Path, size: str) -> Registry:
    """Register two versions of one prompt for a model on disk."""
    job = random_model(folder, size)
    backbone = load_backbone(resolve_model(BaseModelSpec(**job["base_model"])))
    record = BaseModelRecord(
        **{name: getattr(backbone.info, name) for name in BaseModelRecord.model_fields}
    )
    registry = Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache")
    with registry.start_search("live", {}, {}) as search:
        for one in save_prompts(folder / "prompts", size, VERSIONS, 20):
            artifact = PromptArtifact.load(folder / "prompts" / one)
            manifest = artifact.manifest.model_copy(update={"base_model": record})
            saved = PromptArtifact(artifact.weights, manifest).save(folder / "registered" / one)
            registry.register(saved, NAME, search.run_id)
    registry.set_alias(NAME, "champion", 1)
    return registry


@contextmanager
def _serving(registry: Registry, folder: Path) -> Iterator[tuple[str, float]]:
    """Run ``orchestrator serve``.

    Yields its address, and the seconds from its start to its first completion.
    """
    port = free_port()
    url, begun = f"http://127.0.0.1:{port}", time.perf_counter()
    argv = [sys.executable, "-m", "orchestrator", "serve", "--port", str(port)]
    plain = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = plain | {"MLFLOW_TRACKING_URI": registry.tracking_uri}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(argv, env=environment, cwd=folder, stdout=quiet, stderr=quiet)
    try:
        _answered(url, "", begun + START_S, process)
        yield url, time.perf_counter() - begun
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def _promotions(registry: Registry, url: str, count: int) -> list[float]:
    """Return, for each promotion, the seconds until the new version answered."""
    found = []
    for number in range(count):
        version = VERSIONS - number % VERSIONS  # the two versions alternate
        registry.set_alias(NAME, "champion", version)
        begun = time.perf_counter()
        _answered(url, f"{NAME}:{version}", begun + START_S)
        found.append(time.perf_counter() - begun)
        time.sleep(0.37 * (number % 5))  # keeps promotions out of step with the server's polls
    return found


def _answered(
    url: str, version: str, deadline: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until a completion comes from the version, or from any version if it is empty.

    Raises RuntimeError at the deadline, or when the process ends.
    """
    body: dict[str, Any] = {"model": NAME, "prompt": "w1 w2", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=START_S) as client:
        while time.perf_counter() < deadline and (process is None or process.poll() is None):
            try:
                answer = client.post("/v1/completions", json=body)
                if answer.status_code == 200 and version in (
                    "",
                    answer.json()["system_fingerprint"],
                ):
                    return
            except httpx.TransportError:
                pass  # the server is not up yet
            time.sleep(ASKED_EVERY_S)
    raise RuntimeError(f"no answer from {version or 'any version'}")
