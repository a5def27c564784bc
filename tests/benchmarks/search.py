"""A whole search, ours against what people do without us, and ours with one of its gains taken away at a time.

Every side is a program of its own on the same cores, one after another for each seed: the same story model, rows, draws
from the space, steps, batches and evaluations. Its seconds run from the start of the program to its end: imports, Ray's
start, data, training. Ours also evaluates baselines and the test split, writes to MLflow and registers the best prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks import jobs, processes
from tests.benchmarks.measure import Line
from tests.benchmarks.processes import MEGABYTE

OURS = "ours"
PEERS = {
    "recipe: Tune + TorchTrainer + PEFT + Trainer": "recipe",
    "class trainable, reused, ASHA": "reused",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ours without the step": {"plain_step": True},
    "ours without packing": {"resources": {"trials_per_worker": 1}},
    "ours without reuse": {"fresh_actors": True},
    "ours without ASHA": {"scheduler": "fifo"},
}


@dataclass(frozen=True)
class Setting:
    """``target``: a validation accuracy. ``copies``: how often the model has each of its words. ``ablations``: whether
    they run too."""

    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 32
    steps: int = 200
    batch: int = 16
    every: int = 25
    grace: int = 50
    validation: int = 100
    target: float = 0.4
    lengths: tuple[int, ...] = (10, 20)
    copies: int = 1
    ablations: bool = True


SMALL = Setting(seeds=(0,), trials=8, steps=60, every=20, grace=20, target=0.3)
MIDDLE = Setting(trials=16, steps=100, grace=25, target=0.35, ablations=False)
LONG = replace(
    MIDDLE, lengths=(20, 100)
)  # the papers' usual ones, behind which rows are the smaller part
USUAL = replace(
    LONG, copies=12
)  # 49,152 words, about what GPT-2 and OPT have; Llama 3 and Qwen have three times as many
SETTINGS = {"real": Setting(), "middle": MIDDLE, "long": LONG, "usual": USUAL, "small": SMALL}


@dataclass(frozen=True)
class Side:
    """What a side did with one seed."""

    seconds: float
    to_target: float | None
    best: float
    steps: int
    peak: int
    load: float


def lines(setting: Setting, only: str = "") -> list[Line]:
    """A line a side; ``only``: sides with this in their name, and ours."""
    names = [OURS, *PEERS, *(ABLATIONS if setting.ablations else ())]
    found: dict[str, list[Side]] = {name: [] for name in names if name == OURS or only in name}
    for seed in setting.seeds:
        for name, sides in found.items():
            sides.append(side(setting, name, seed))
            print(
                f"  seed {seed}, {name}: {sides[-1]}", flush=True
            )  # hours may pass until the table
    return [line(name, sides, found[OURS]) for name, sides in found.items()]


def job(setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    """The job that every side has."""
    return {
        **jobs.trec6(folder, validation=setting.validation, copies=setting.copies),
        "search": {
            "space": {
                "num_virtual_tokens": list(setting.lengths), "learning_rate": {"loguniform": [0.01, 0.3]},
                "seed": [0, 1, 2],
            },
            "trials": setting.trials, "scheduler": "asha", "grace_steps": setting.grace, "seed": seed,
        },
        "train": {"steps": setting.steps, "batch_size": setting.batch, "evaluate_every": setting.every},
    }  # fmt: skip


def side(setting: Setting, name: str, seed: int) -> Side:
    with TemporaryDirectory(prefix="bench-") as folder:
        asked = job(setting, Path(folder), seed)
        changes = dict(ABLATIONS.get(name, {}))
        asked["search"]["scheduler"] = changes.pop("scheduler", "asha")
        if asked["search"]["scheduler"] != "asha":
            del asked["search"]["grace_steps"]
        asked["resources"] = changes.pop("resources", {})
        if name in PEERS:
            ran = processes.run_in(folder, "peer_search", {"job": asked, "kind": PEERS[name]})
        else:
            ran = processes.run_in(folder, "our_search", {"job": asked, **changes})
    return side_of(ran, setting.target)


def side_of(ran: processes.Ran, target: float) -> Side:
    reports = ran.found["reports"]
    reached = [report["at"] - ran.started for report in reports if report["score"] >= target]
    best = max(report["score"] for report in reports)
    return Side(
        ran.seconds, min(reached, default=None), best, ran.found["steps"], ran.peak, ran.load
    )


def line(name: str, sides: Sequence[Side], ours: Sequence[Side]) -> Line:
    ratios = [one.seconds / other.seconds for one, other in zip(sides, ours, strict=True)]
    both = [
        one.to_target / other.to_target
        for one, other in zip(sides, ours, strict=True)
        if one.to_target is not None and other.to_target is not None
    ]
    shown: dict[str, float | str] = {
        "seconds": statistics.median(one.seconds for one in sides),
        "times ours": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "to target, s": _median([one.to_target for one in sides]),
        "times ours ": statistics.median(both) if both else "",
        "accuracy": f"{min(one.best for one in sides):.2f} to {max(one.best for one in sides):.2f}",
        "steps": statistics.median(one.steps for one in sides),
        "peak, MB": max(one.peak for one in sides) / MEGABYTE,
        "load": statistics.median(one.load for one in sides),
    }
    return Line(
        name,
        shown,
        {"sides": [asdict(one) for one in sides], "ratios": ratios, "ratios to target": both},
    )


def _median(values: Sequence[float | None]) -> float | str:
    """``never`` where a side did not reach it with every seed."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if len(found) == len(values) else "never"
