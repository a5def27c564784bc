"""The plan's estimate against the outcome of the same search.

The jobs differ in model, length and scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks import jobs, processes
from tests.benchmarks.measure import Line
from tests.benchmarks.processes import MEGABYTE, Ran


@dataclass(frozen=True)
class Setting:
    """The factor by which the jobs' steps are shortened."""

    shortened: int = 1


SETTINGS = {"real": Setting(), "small": Setting(shortened=4)}


def documents(setting: Setting, folder: Path) -> dict[str, dict[str, Any]]:
    """Return jobs by name.

    The quickstart needs nothing but this repository; the others are those of jobs/, shortened.
    """

    def job(
        data: dict[str, Any], trials: int, steps: int, every: int, **search: Any
    ) -> dict[str, Any]:
        space = {
            "num_virtual_tokens": [5, 20],
            "learning_rate": {"loguniform": [0.01, 0.3]},
            "seed": [0, 1, 2],
        }
        return {
            **data,
            "search": {"space": space, "trials": trials, **search},
            "train": {"steps": max(2, steps // setting.shortened), "batch_size": 16,
                      "evaluate_every": max(1, every // setting.shortened)},
        }  # fmt: skip

    quickstart = {
        "name": "quickstart",
        "base_model": {"id": "builtin:quickstart"},
        "data": {
            "path": "builtin:quickstart", "template": "{text}\nAnswer:", "target": "label",
            "verbalizer": {"positive": " yes", "negative": " no"}, "max_input_tokens": 96,
        },
    }  # fmt: skip
    return {
        "quickstart, 16 trials, asha": job(quickstart, 16, 120, 20),
        "trec6, 6 trials, fifo": job(jobs.trec6(folder, 300, 500), 6, 200, 50, scheduler="fifo"),
        "sms-spam, 12 trials, asha": job(jobs.sms_spam(folder, 550, 554), 12, 200, 50),
    }


def lines(setting: Setting, only: str = "") -> list[Line]:
    """Return the lines of the jobs with ``only`` in their name."""
    found = []
    with TemporaryDirectory(prefix="bench-") as data:
        for name, job in documents(setting, Path(data)).items():
            if only in name:
                with TemporaryDirectory(prefix="bench-") as folder:
                    ran = processes.run_in(folder, "our_search", {"job": job, "planned": True})
                found += of(name, ran)
    return found


def of(name: str, ran: Ran) -> list[Line]:
    """Return lines for the seconds in all and of the parts, and for the bytes of the worker."""
    document = ran.found["document"]
    plan, seconds = document["plan"], document["seconds"]
    peaks = [
        one["value"]
        for worker in ran.found["work"].values()
        for one in worker
        if one["kind"] == "peak"
    ]
    begun = ran.found["started"][0]
    loads = {
        "load, planning": ran.load_between(0.0, begun),
        "load, running": ran.load_between(begun, math.inf),
    }
    estimated = {"total": plan["seconds"]["total"], **estimate(plan["seconds"])}
    found = [
        compared(f"{name}: {part}, s", estimated[part], value, loads)
        for part, value in outcome(seconds).items()
    ]
    usual, most = (plan["memory"][name] / MEGABYTE for name in ("usual", "worker"))
    held = max(peaks) / MEGABYTE
    memory = {"worker, MB": usual, "worker at the most, MB": most}
    return [
        *found,
        *(compared(f"{name}: {what}", value, held, loads) for what, value in memory.items()),
    ]


def outcome(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the measured seconds of the parts of a plan.

    The time of planning itself is left out.
    """
    return {
        "total": seconds["total"] - seconds["plan"] - seconds["model"],
        "startup": seconds["prepare"] + seconds["ray"] + seconds["workers"],
        "search": seconds["trials"],
        "end": seconds["test"] + seconds["registry"],
    }


def estimate(seconds: Mapping[str, float]) -> dict[str, float]:
    return {
        "startup": seconds["startup"],
        "search": seconds["baselines"] + seconds["search"],
        "end": seconds["test"] + seconds["end"],
    }


def compared(name: str, planned: float, found: float, loads: Mapping[str, float]) -> Line:
    off = 100 * (planned - found) / found
    return Line(name, {"planned": planned, "outcome": found, "off, %": off, **loads})
