"""One search, as ``orchestrator run`` does it: ``python -m tests.benchmarks.our_search JSON``.

The file out.json holds the run's document. It also says when each report reached the driver, how
much memory the driver held then, and when the worker did which work. All time outside rounds and
evaluations is overhead.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAIN = "BENCH_PLAIN_STEP"
WORK = "BENCH_WORK"


@dataclass(frozen=True)
class Asked:
    """Arguments of the program.

    ``job`` is the document of a job file. The other fields disable one of our optimisations or set
    up the run.
    """

    job: dict[str, Any]
    folder: str = "."
    plain_step: bool = False  # the prompt in every row, and logits at every token
    fresh_actors: bool = False  # a new Tune actor for each trial
    planned: bool = False
    nodes: int = 0  # nodes of a cluster simulated on this machine; 0: the search starts local Ray
    profile: bool = False  # profile the driver's main thread into profile.txt


class Timeline:
    """Progress of a search, recorded as a list of moments."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.started: list[float] = []
        self.ended: list[float] = []

    def stage(self, text: str) -> None: ...

    def within(self, readings: object) -> None: ...

    def note(self, text: str) -> None: ...

    def trials(
        self, trials: Sequence[Any], total: int, history: Any
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def trial_started(self, trial: str, spec: Any) -> None:
        self.started.append(time.time())

    def trial_ended(self, trial: str, status: str, note: str) -> None:
        self.ended.append(time.time())

    def trial_reported(self, trial: str, report: Any) -> None:
        self.reports.append(
            {
                "at": time.time(),
                "trial": trial,
                "step": report.step,
                "score": report.score,
                "driver": held_bytes(),
            }
        )


def held_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watched_loop(config: dict[str, Any]) -> None:
    """Run the worker's own loop in the worker and record to a file when it did which work.

    The last record is the peak of its memory.
    """
    from orchestrator.search.workers import worker
    from orchestrator.tuning.engine import Engine

    name = config["worker"].name
    with Path(os.environ[WORK], f"{name}.jsonl").open("w") as stream:
        loading = time.time()
        load = worker.load_engine

        def loaded(told: Any) -> Any:
            engine = load(told)
            _say(stream, "load", loading)
            return _plain(engine) if os.environ.get(PLAIN) else engine

        worker.load_engine = loaded
        for kind in ("round", "evaluate"):
            setattr(Engine, kind, _timed(stream, kind, getattr(Engine, kind)))
        worker.train_loop(config)
        _say(stream, "peak", time.time(), _peak())


def _timed(stream: Any, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **options: Any) -> Any:
        started = time.time()
        try:
            return call(*args, **options)
        finally:
            _say(stream, kind, started)

    return timed


def _say(stream: Any, kind: str, started: float, value: float = 0.0) -> None:
    stream.write(
        json.dumps({"kind": kind, "from": started, "to": time.time(), "value": value}) + "\n"
    )
    stream.flush()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _plain(engine: Any) -> Any:
    """Return the engine without the optimisations of its step: see ``plain_backbone``."""
    plain_backbone(engine.backbone)
    return engine


def plain_backbone(backbone: Any) -> None:
    """Put the prompt into every row and compute logits at every token from now on."""
    backbone.prompt_once = False
    forward = backbone.model.forward

    @functools.wraps(forward)  # transformers inspects the signature
    def everywhere(*args: Any, logits_to_keep: Any = None, **options: Any) -> Any:
        out = forward(*args, **options)
        if logits_to_keep is not None:
            out.logits = out.logits[:, logits_to_keep]
        return out

    backbone.model.forward = everywhere


@contextmanager
def prepared_process(asked: Asked) -> Iterator[None]:
    """Set up this process as ``asked`` says, and through its environment Ray's processes."""
    from orchestrator.search.study import study
    from orchestrator.search.workers import train_group as worker_group

    os.environ[WORK] = asked.folder
    if asked.plain_step:
        os.environ[PLAIN] = "1"
    worker_group.train_loop = importable(watched_loop)
    if asked.fresh_actors:
        study.TuneConfig = functools.partial(_without_reuse, study.TuneConfig)
    with _cluster(asked.nodes) if asked.nodes else nullcontext():
        yield


def importable(function: Callable[..., Any]) -> Any:
    """Return the function through its module's name.

    Ray would send a function of the main module by value.
    """
    import importlib

    return getattr(importlib.import_module("tests.benchmarks.our_search"), function.__name__)


def _without_reuse(made: Any, **options: Any) -> Any:
    return made(**{**options, "reuse_actors": False})


@contextmanager
def _cluster(nodes: int) -> Iterator[None]:
    """Start a cluster of ``nodes`` nodes with two CPUs each on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from orchestrator.cluster.ray_internals.settings import SEARCH

    os.environ.update(SEARCH)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(asked: Asked) -> None:
    from orchestrator.job.yaml import load_job
    from orchestrator.search.run import run_job

    file = Path("job.yaml")
    file.write_text(json.dumps(asked.job))
    timeline = Timeline()
    with prepared_process(asked):
        ready = time.time()
        work = functools.partial(run_job, load_job(file), timeline, planned=asked.planned)
        document = profiled(work) if asked.profile else work()
        done = time.time()
    found = {
        "asked": asdict(asked),
        "document": {**document, "trials": len(document["trials"])},
        "steps": sum(trial["steps"] for trial in document["trials"]),
        "from": ready,
        "to": done,
        "reports": timeline.reports,
        "started": timeline.started,
        "ended": timeline.ended,
        "work": {
            file.stem: [json.loads(line) for line in file.read_text().splitlines()]
            for file in Path().glob("w*.jsonl")
        },
    }
    Path("out.json").write_text(json.dumps(found, default=str))


def profiled(work: Callable[[], Any]) -> Any:
    """Run ``work`` and write a profile of the driver's main thread to profile.txt."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    result = profile.runcall(work)
    with Path("profile.txt").open("w") as stream:
        pstats.Stats(profile, stream=stream).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile, stream=stream).sort_stats("tottime").print_stats(40)
    return result


if __name__ == "__main__":
    from orchestrator.utils.ending import end_process

    main(Asked(**json.loads(sys.argv[1])))
    end_process(0)
