"""Requests a second and latency over HTTP: ours against PEFT behind FastAPI, in turn, on loopback.

Both sides are uvicorn with FastAPI in a process of their own, with the same weights and prompts and
one torch thread; their answers are checked to be equal. This process runs the clients. "Plain"
handles one request after another (set_adapter, generate). "Batched" handles together all requests
that wait for the adapter of the oldest request.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import httpx

from tests.benchmarks.measure import Line
from tests.benchmarks.serving_subject import save_prompts
from tests.benchmarks.subjects import SIZES

START_S = 300.0


@dataclass(frozen=True)
class Setting:
    """Size of the model, and numbers of prompts, clients and requests."""

    size: str = "6x192"
    lengths: tuple[int, ...] = (20, 100)
    prompts: int = 16
    many: int = 1000
    clients: int = 64
    requests: int = 256
    inputs: int = 32
    answer: int = 4
    pairs: int = 3
    peers: tuple[str, ...] = ("plain", "batched")


@dataclass
class Side:
    """Requests a second of each run, and all latencies, of one server."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def p99_ms(self) -> float:
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]

    @property
    def p50_ms(self) -> float:
        return 1000 * statistics.median(self.latencies)


Asked = tuple[str, str]  # model, prompt


def peer_lines(setting: Setting) -> list[Line]:
    """Return a line for each prompt length and kind of peer."""
    return [_against(setting, length, kind) for length in setting.lengths for kind in setting.peers]


def many_lines(setting: Setting) -> list[Line]:
    """Compare traffic over many prompts with traffic on one prompt, on the same server."""
    # More requests than elsewhere, since the difference is small.
    length, setting = (setting.lengths[0], replace(setting, requests=4 * setting.requests))
    with tempfile.TemporaryDirectory() as folder:
        names = save_prompts(Path(folder), setting.size, setting.many, length)
        with running("ours", setting, Path(folder)) as url:
            all_, one = Side(), Side()
            for _ in range(setting.pairs + 1):
                measure(url, setting, requests(setting, names), all_)
                measure(url, setting, requests(setting, names[:1]), one)
            _warm(all_, one)
            each = [a / b for a, b in zip(all_.rates, one.rates, strict=True)]
            loaded = _gauge(url, "orchestrator_loaded_prompt_bytes")
    shown: dict[str, float | str] = {
        "one, req/s": statistics.median(one.rates),
        "many, req/s": statistics.median(all_.rates),
        "share": statistics.median(each),
        "spread": f"{min(each):.2f} to {max(each):.2f}",
        "kB a prompt": loaded / setting.many / 1000,
    }
    return [
        Line(
            f"{setting.many} prompts of {length} against one",
            shown,
            {"rates": [one.rates, all_.rates]},
        )
    ]


PLACES = {
    "uvicorn alone": ("null", "ours"),
    "Ray Serve": ("serve-null", "serve-ours"),
    "Ray Serve, with the front": ("front-null", "front-ours"),
}
"""Ways to run the routes; for each, the server kinds without and with an engine."""


def http_lines(setting: Setting) -> list[Line]:
    """Measure the cost of HTTP, JSON and checks, and of Ray Serve.

    The same routes are also measured with an engine that answers at once.
    """
    there = find_spec("ray") is not None
    return [
        _place(setting, name, *kinds)
        for name, kinds in PLACES.items()
        if there or name == "uvicorn alone"
    ]


def _place(setting: Setting, name: str, without: str, with_engine: str) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        names = save_prompts(Path(folder), setting.size, setting.prompts, setting.lengths[0])
        null, real = Side(), Side()
        with (
            running(without, setting, Path(folder)) as nothing,
            running(with_engine, setting, Path(folder)) as ours,
        ):
            for _ in range(setting.pairs + 1):
                measure(nothing, setting, requests(setting, names), null)
                measure(ours, setting, requests(setting, names), real)
    _warm(null, real)
    shown: dict[str, float | str] = {
        "null, req/s": statistics.median(null.rates),
        "ours, req/s": statistics.median(real.rates),
        "null p50, ms": null.p50_ms,
        "ours p50, ms": real.p50_ms,
    }
    return Line(f"{name}: no engine, and ours", shown, {"rates": [null.rates, real.rates]})


def _against(setting: Setting, length: int, kind: str) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        names = save_prompts(Path(folder), setting.size, setting.prompts, length)
        ours, peer = Side(), Side()
        with (
            running("ours", setting, Path(folder)) as mine,
            running(kind, setting, Path(folder)) as theirs,
        ):
            for number in range(setting.pairs + 1):
                asked = requests(setting, names, seed=number)
                answers = [
                    measure(url, setting, asked, side)
                    for url, side in ((mine, ours), (theirs, peer))
                ]
                equal = sum(one == other for one, other in zip(*answers, strict=True))
                if equal < 0.99 * len(asked):  # rare ties between two tokens may differ
                    raise AssertionError(f"only {equal} of {len(asked)} answers are equal")
    _warm(ours, peer)
    each = [a / b for a, b in zip(ours.rates, peer.rates, strict=True)]
    shown: dict[str, float | str] = {
        "ours, req/s": statistics.median(ours.rates),
        "peer, req/s": statistics.median(peer.rates),
        "times as many": statistics.median(each),
        "spread": f"{min(each):.2f} to {max(each):.2f}",
        "ours p99, ms": ours.p99_ms,
        "peer p99, ms": peer.p99_ms,
    }
    return Line(
        f"P = {length}, PEFT {kind}", shown, {"rates": [ours.rates, peer.rates], "equal": equal}
    )


def _warm(*sides: Side) -> None:
    """Drop the first run of each side, which is a warm-up."""
    for side in sides:
        counted = len(side.latencies) // len(side.rates)
        del side.rates[0], side.latencies[:counted]


def requests(setting: Setting, names: Sequence[str], seed: int = 0) -> list[Asked]:
    """Return inputs of equal length, each for a prompt drawn at random."""
    draw, words = random.Random(seed), SIZES[setting.size].vocabulary
    return [
        (
            draw.choice(names),
            " ".join(f"w{draw.randrange(1, words)}" for _ in range(setting.inputs)),
        )
        for _ in range(setting.requests)
    ]


def measure(url: str, setting: Setting, asked: Sequence[Asked], side: Side) -> list[str]:
    """Send all requests and return the texts, in order; ``setting.clients`` run at a time."""
    return asyncio.run(_measure(url, setting, asked, side))


async def _measure(url: str, setting: Setting, asked: Sequence[Asked], side: Side) -> list[str]:
    texts = [""] * len(asked)
    line = iter(enumerate(asked))
    total, connector = (
        aiohttp.ClientTimeout(total=START_S),
        aiohttp.TCPConnector(limit=setting.clients),
    )

    # Not httpx: its pool of 64 connections costs this process 5 ms a request, more than either
    # server needs.
    async with aiohttp.ClientSession(url, timeout=total, connector=connector) as client:

        async def ask() -> None:
            for place, (model, prompt) in line:
                start = time.perf_counter()
                body = {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": setting.answer,
                    "temperature": 0,
                }
                async with client.post("/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    document = await answer.json()
                texts[place] = document["choices"][0]["text"].strip()
                side.latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(setting.clients)))
        side.rates.append(len(asked) / (time.perf_counter() - start))
    return texts


@contextmanager
def running(kind: str, setting: Setting, folder: Path) -> Iterator[str]:
    """Run a server of the kind in its own process and yield its address."""
    port = free_port()
    arguments = {"kind": kind, "size": setting.size, "folder": str(folder), "port": port}
    module = "serve_subject" if "-" in kind else "serving_subject"
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", json.dumps(arguments)]
    process = subprocess.Popen(command)
    try:
        _await(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("a server did not come up")


def _gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return next(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} ")
    )
