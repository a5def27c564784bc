"""A serving process with very many prompts, measured in a fresh process.

Memory, lookups, polls of the registry, metrics and requests are measured. All prompts are one
artifact under many names, on a toy model. Keys and values are small there, so that the rest of the
memory is the cost of a prompt with any model.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch: sets how OpenMP threads wait

# isort: split
import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.registry import LiveModel
from orchestrator.serving.http.metrics import Metrics
from orchestrator.serving.http.protocol import CompletionRequest, parse_body
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.prompts.store import PromptStore
from tests.benchmarks.serving_subject import NullEngine, save_prompts
from tests.benchmarks.subjects import SIZES, backbone_of, make_model

LENGTH = 20
INPUT = " ".join(f"w{place}" for place in range(1, 33))
ROOM = 1 << 40


class OneArtifact:
    """A registry of many names that all have the same artifact."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder = folder
        self._live = {name: LiveModel({"champion": 1}) for name in names}

    def live(self) -> Mapping[str, LiveModel]:
        return self._live

    def fetch(self, name: str, version: int) -> Path:
        return self._folder


def measure_here(count: int, asked: int, size: str = "toy") -> dict[str, float]:
    """Measure ``count`` prompts and ``asked`` requests for them.

    Returns bytes, and seconds of CPU time.
    """
    torch.set_num_threads(1)
    names = [f"prompt-{number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        (saved,) = save_prompts(Path(folder), size, 1, LENGTH)
        backbone = backbone_of(make_model(SIZES[size], torch.device("cpu")))
        store = PromptStore(backbone, OneArtifact(Path(folder, saved), names), max_bytes=ROOM)
        before = psutil.Process().memory_info().rss
        found = {"load": cpu(store.refresh) / count}
        found["resident"] = (psutil.Process().memory_info().rss - before) / count
    found["keys and values"] = store.loaded_bytes / count
    found["follow"] = cpu(store.refresh)
    draw = random.Random(0)
    drawn = [draw.choice(names) for _ in range(asked)]
    found["lookup"] = cpu(lambda: [store.loaded(name) for name in drawn]) / asked
    found["listing"] = cpu(store.cards)
    found |= exposition(names) | requests(store, NullEngine(backbone), drawn)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def exposition(names: list[str]) -> dict[str, float]:
    """Return the seconds and bytes of the Prometheus metrics after a request to every model."""
    metrics = Metrics()
    for name in names:
        metrics.request("/v1/completions", 200, 0.1, name)
        metrics.tokens(name, 1, 1)
        metrics.first_token(name, 0.1)
    texts: list[bytes] = []
    return {"metrics": cpu(lambda: texts.append(metrics.text())), "metrics, bytes": len(texts[0])}


def requests(store: PromptStore, engine: NullEngine, drawn: list[str]) -> dict[str, float]:
    """Return the seconds of each part of a completion request, and of the whole request.

    The input has 32 tokens. There is no socket and no model.
    """
    bodies = [
        json.dumps({"model": name, "prompt": INPUT, "max_tokens": 4}).encode() for name in drawn
    ]
    prompt = store.get(drawn[0])
    api = make_api(PromptService(store, engine))
    return {
        "parse": cpu(lambda: [parse_body(CompletionRequest, body) for body in bodies]) / len(drawn),
        "encode": cpu(lambda: [prompt.encode(INPUT, 4) for _ in drawn]) / len(drawn),
        "request": cpu(lambda: asyncio.run(ask(api, bodies))) / len(drawn),
    }


async def ask(api: Any, bodies: list[bytes]) -> None:
    """Send each body to the application, one after another."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def one(body: bytes) -> None:
        asked = [{"type": "http.request", "body": body, "more_body": False}]
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            if not asked:
                await asyncio.Event().wait()
            return asked.pop()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await api(dict(scope), receive, send)
        if statuses != [200]:
            raise AssertionError(f"the application answered {statuses}")

    for body in bodies:
        await one(body)


def cpu(call: Callable[[], Any]) -> float:
    """Return the seconds of CPU time of this process, its threads included.

    Other processes on the machine affect CPU time less than wall time.
    """
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    print(json.dumps(measure_here(**json.loads(sys.argv[1]))))
