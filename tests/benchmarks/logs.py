"""Cost of MLflow: a search's rounds with and without logging, and a listing of many models.

The figure is CPU time of the process that trains and also writes the log; in a search those are two
processes. Each report is written before the next round. The work of an MLflow server is not
included: it is another program, usually on another machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.job.spec import TrainSpec
from orchestrator.registry import Registry, SearchLog
from orchestrator.tuning.engine import Engine
from tests.benchmarks import overhead
from tests.benchmarks.measure import Line
from tests.benchmarks.subjects import SIZES, make_backbone
from tests.filled_store import fill
from tests.mlflow_server import Server


@dataclass(frozen=True)
class Setting:
    """The model, the steps between two evaluations, and the size of the registry to list."""

    pairs: int = 3
    size: str = "6x192"
    steps: int = TrainSpec().evaluate_every
    models: int = 1000
    versions: int = 20


def search_lines(setting: Setting) -> list[Line]:
    """Return a line for each kind of store, comparing rounds with and without logging."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("sqlite", "server"):
            folder = Path(scratch, name)
            folder.mkdir()
            with _store(name, folder) as uri:
                found.append(_line(setting, name, uri, folder))
    return found


@contextmanager
def _store(name: str, folder: Path) -> Iterator[str]:
    if name == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    server = Server(folder).start()
    try:
        yield server.uri
    finally:
        server.stop()


def _line(setting: Setting, name: str, uri: str, folder: Path) -> Line:
    own = overhead.Setting()
    backbone = make_backbone(SIZES[setting.size], own.device)
    engine = overhead._engine(own, backbone, setting.steps * (2 * setting.pairs + 1))
    engine.train = engine.train.model_copy(update={"evaluate_every": setting.steps})
    engine.round()  # warm-up, not measured
    cpus: dict[bool, list[float]] = {True: [], False: []}
    calls = 0.0
    with Registry(uri).start_search(
        "bench", {"size": setting.size}, {}, spill=folder / "unwritten.jsonl"
    ) as log:
        for trial in range(own.trials):
            log.trial_started(f"trial {trial}", {"seed": trial})
        log.flush(60)
        for _ in range(setting.pairs):
            for logged in (False, True):
                cpu = time.process_time()
                calls += _round(engine, log if logged else None)
                cpus[logged].append(time.process_time() - cpu)
    shares = [100 * (one / other - 1) for one, other in zip(cpus[True], cpus[False], strict=True)]
    title = (
        f"{setting.size}, {own.trials} trials of {own.batch} rows, {setting.steps} steps, {name}"
    )
    return Line(
        title,
        {
            "CPU without, s": statistics.median(cpus[False]),
            "CPU with, s": statistics.median(cpus[True]),
            "CPU added, %": statistics.median(shares),
            "training waits, ms": 1000 * calls / setting.pairs,
        },
        {"cpu, s": [cpus[False], cpus[True]]},
    )


def _round(engine: Engine, log: SearchLog | None) -> float:
    """Run a round and log its reports.

    Returns the seconds that the logging calls themselves took.
    """
    reports = engine.round()
    start = time.perf_counter()
    if log is not None:
        for report in reports:
            named = {f"validation_{name}": value for name, value in report.metrics.items()}
            log.trial_metrics(report.trial, report.step, {**named, "train_loss": report.train_loss})
    waited = time.perf_counter() - start
    if log is not None:
        log.flush(60)
    return waited


def listing_lines(setting: Setting) -> list[Line]:
    """Return the seconds of ``orchestrator models`` on an SQLite file.

    The whole command and reading the registry alone are both measured.
    """
    with tempfile.TemporaryDirectory() as scratch:
        uri = f"sqlite:///{scratch}/mlflow.db"
        registry = Registry(uri)
        registry.check()
        fill(uri, setting.models, setting.versions)
        reading, reading_cpu, command = [], [], []
        argv = [sys.executable, "-m", "orchestrator", "models"]
        for _ in range(setting.pairs):
            wall, cpu = time.perf_counter(), time.process_time()
            registry.list_models()
            reading.append(time.perf_counter() - wall)
            reading_cpu.append(time.process_time() - cpu)
            wall = time.perf_counter()
            environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
            subprocess.run(
                argv, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=Path.cwd()
            )
            command.append(time.perf_counter() - wall)
    title = f"listing {setting.models} models of {setting.versions} versions, sqlite"
    shown = {
        "command, s": min(command),
        "reading, s": min(reading),
        "reading CPU, s": min(reading_cpu),
    }
    return [Line(title, shown, {"command, s, each": command, "reading, s, each": reading})]
