"""Overhead of a search beyond arithmetic: seconds a trial, share of a search, growth with trials.

Arithmetic is the time that the worker spends in rounds of training and in evaluations. The rest is
overhead: starting, a report's way to Tune and back, and the work of Tune and MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks import jobs, processes
from tests.benchmarks.measure import Line
from tests.benchmarks.processes import MEGABYTE, Ran

ARITHMETIC = ("round", "evaluate")


@dataclass(frozen=True)
class Setting:
    """Numbers of trials.

    ``few``: in a search with almost no arithmetic; ``real``: in a real search; ``many``: in a
    search that shows whether the overhead grows.
    """

    few: int = 200
    real: int = 32
    real_steps: int = 200
    many: int = 1000


SETTINGS = {"real": Setting(), "small": Setting(few=40, real=8, many=200)}


def lines(setting: Setting, only: str = "") -> list[Line]:
    parts = {
        f"overhead, {setting.few} trials": lambda: few_lines(setting),
        f"share, {setting.real} trials of {setting.real_steps} steps": lambda: share_lines(setting),
        f"slope, {setting.many} trials": lambda: slope_lines(setting),
    }
    return [line for name, part in parts.items() if only in name for line in part()]


def short_search(trials: int, scheduler: str = "asha") -> Ran:
    """Run trials of at most two steps of a toy model, with a report after each step."""
    with TemporaryDirectory(prefix="bench-") as folder:
        job = jobs.random_model(Path(folder))
        job |= {
            "search": {
                "space": {
                    "num_virtual_tokens": [2, 3],
                    "learning_rate": {"loguniform": [0.01, 0.3]},
                },
                "trials": trials,
                "scheduler": scheduler,
            },
            "train": {"steps": 2, "batch_size": 4, "evaluate_every": 1},
        }
        return processes.run_in(folder, "our_search", {"job": job})


def few_lines(setting: Setting) -> list[Line]:
    ran = short_search(setting.few, "fifo")
    return [overhead_line(f"{setting.few} trials of two steps, toy model", ran, setting.few)]


def share_lines(setting: Setting) -> list[Line]:
    with TemporaryDirectory(prefix="bench-") as folder:
        job = jobs.trec6(Path(folder))
        job |= {
            "search": {
                "space": {
                    "num_virtual_tokens": [10, 20],
                    "learning_rate": {"loguniform": [0.01, 0.3]},
                },
                "trials": setting.real,
                "scheduler": "fifo",
            },
            "train": {"steps": setting.real_steps, "batch_size": 16, "evaluate_every": 50},
        }
        ran = processes.run_in(folder, "our_search", {"job": job})
    return [
        overhead_line(
            f"{setting.real} trials of {setting.real_steps} steps, stories3M", ran, setting.real
        )
    ]


def overhead_line(name: str, ran: Ran, trials: int) -> Line:
    """Return the overhead of a search.

    It is given between the worker's first round and the last report, and also for the whole
    program, start and end included.
    """
    work = [
        one for worker in ran.found["work"].values() for one in worker if one["kind"] in ARITHMETIC
    ]
    rounds = [one for one in work if one["kind"] == "round"]
    first, last = rounds[0]["from"], ran.found["reports"][-1]["at"]
    arithmetic = spent(work)
    running = last - first - spent([one for one in work if first <= one["from"] < last])
    shown: dict[str, float | str] = {
        "seconds": ran.seconds,
        "arithmetic, s": arithmetic,
        "overhead a trial, s": running / trials,
        "with start and end": (ran.seconds - arithmetic) / trials,
        "overhead, %": 100 * running / (last - first),
        "with start and end, %": 100 * (ran.seconds - arithmetic) / ran.seconds,
        "load": ran.load,
    }
    return Line(name, shown, {"document": ran.found["document"]["seconds"], "peak": ran.peak})


def spent(work: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(one["to"] - one["from"] for one in work))


def slope_lines(setting: Setting) -> list[Line]:
    ran = short_search(setting.many, "fifo")
    return [
        overhead_line(f"{setting.many} trials of two steps, toy model", ran, setting.many),
        *quarters(ran),
    ]


def quarters(ran: Ran) -> list[Line]:
    """Return a line for each quarter of the reports.

    It has the rate of the reports and the memory that the driver held at the end.
    """
    reports = ran.found["reports"]
    work = [
        one for worker in ran.found["work"].values() for one in worker if one["kind"] in ARITHMETIC
    ]
    found = []
    for part in range(4):
        first, last = (len(reports) * end // 4 for end in (part, part + 1))
        start, end = reports[first]["at"], reports[last - 1]["at"]
        within = spent([one for one in work if start <= one["from"] < end])
        shown: dict[str, float | str] = {
            "results/s": (last - 1 - first) / (end - start),
            "ms a result": 1000 * (end - start) / (last - 1 - first),
            "beyond arithmetic": 1000 * (end - start - within) / (last - 1 - first),
            "driver, MB": reports[last - 1]["driver"] / MEGABYTE,
        }
        found.append(Line(f"results {first + 1} to {last}", shown))
    return found
