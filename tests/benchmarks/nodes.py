"""A cluster of many small nodes, all simulated on this machine, with one worker group a node.

The model is a toy, so that the figures show the overhead of Ray and of this project: the time until
every group is placed and has its model, and the time of a trial beyond arithmetic as nodes and
trials grow. The nodes share this machine's cores, so most of the time is the start of processes, a
few seconds of one core each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import jobs, processes
from tests.benchmarks.measure import Line
from tests.benchmarks.processes import MEGABYTE, Broken, Ran
from tests.benchmarks.trials import spent


@dataclass(frozen=True)
class Setting:
    """Numbers of nodes with ``trials`` trials a node, and cases in ``growth`` with more trials."""

    nodes: tuple[int, ...] = (1, 2, 4, 8, 16)
    trials: int = 8
    growth: tuple[tuple[int, int], ...] = ((4, 32), (4, 128))  # nodes, trials a node
    limit_s: float = 900.0


SETTINGS = {"real": Setting(), "small": Setting(nodes=(1, 2, 4), growth=())}


def lines(setting: Setting) -> list[Line]:
    """Measure growing numbers of nodes, up to the first number that fails on this machine."""
    found = []
    for nodes in setting.nodes:
        try:
            found.append(_line(nodes, setting.trials, setting.limit_s))
        except Broken as error:
            reason = str(error).splitlines()
            found.append(Line(f"{nodes} nodes", {"failed": reason[0]}, {"log": reason}))
            break
        print(f"  {found[-1].name}: {found[-1].shown}", flush=True)
    return [*found, *(_line(nodes, trials, setting.limit_s) for nodes, trials in setting.growth)]


def _line(nodes: int, trials: int, limit_s: float) -> Line:
    with TemporaryDirectory(prefix="bench-") as folder:
        job = jobs.random_model(Path(folder))
        job |= {
            "search": {
                "space": {
                    "num_virtual_tokens": [2, 3],
                    "learning_rate": {"loguniform": [0.01, 0.3]},
                },
                "trials": nodes * trials, "scheduler": "fifo",
            },
            "train": {"steps": 2, "batch_size": 4, "evaluate_every": 1},
            "resources": {"workers": nodes, "cpus_per_worker": 1, "trials_per_worker": 2},
            "registry": {"register_top": 0},
        }  # fmt: skip
        ran = processes.run_in(folder, "our_search", {"job": job, "nodes": nodes}, limit_s)
    return line(nodes, trials, ran)


def line(nodes: int, trials: int, ran: Ran) -> Line:
    """Return the line of one search.

    ``first ready`` and ``all ready`` count from the moment the cluster was up until the first and
    the last group had its model.
    """
    found = ran.found
    loaded = [
        one["to"] - found["from"]
        for worker in found["work"].values()
        for one in worker
        if one["kind"] == "load"
    ]
    first, last = found["reports"][0]["at"], found["reports"][-1]["at"]
    work = [one for worker in found["work"].values() for one in worker if one["kind"] == "round"]
    within = spent([one for one in work if first <= one["from"] < last])
    reports = len(found["reports"])
    shown: dict[str, float | str] = {
        "cluster, s": found["from"] - ran.started,
        "first ready, s": min(loaded), "all ready, s": max(loaded),
        "trained on": sum(
            any(one["kind"] == "round" for one in worker) for worker in found["work"].values()
        ),
        "results/s": (reports - 1) / (last - first),
        "ms a result": 1000 * (last - first) / (reports - 1),
        "arithmetic": 1000 * within / (reports - 1),
        "end, s": ran.started + ran.seconds - last,
        "peak, MB": ran.peak / MEGABYTE, "load": ran.load,
    }  # fmt: skip
    return Line(f"{nodes} nodes, {nodes * trials} trials", shown, {"loaded": loaded})
