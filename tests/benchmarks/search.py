"""A whole search: ours, two ways without this project, and ours with one optimisation removed.

Every side is a program of its own on the same cores; the sides run one after another for each seed.
All have the same story model, rows, draws from the space, steps, batches and evaluations. Seconds
are those of the whole program: imports, Ray's start, data and training. Ours also evaluates
baselines and the test split, writes to MLflow and registers the best prompt.
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
    """Size of the searches.

    ``target``: a validation accuracy. ``copies``: copies of each word in the model's vocabulary.
    ``ablations``: whether the ablations run too.
    """

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
# The prompt lengths usual in papers, at which the rows are the smaller part of the tokens.
LONG = replace(MIDDLE, lengths=(20, 100))
# 49,152 words, about as many as GPT-2 and OPT have; Llama 3 and Qwen have three times as many.
USUAL = replace(LONG, copies=12)
SETTINGS = {"real": Setting(), "middle": MIDDLE, "long": LONG, "usual": USUAL, "small": SMALL}


@dataclass(frozen=True)
class Side:
    """Result of one side with one seed."""

    seconds: float
    to_target: float | None
    best: float
    steps: int
    peak: int
    load: float


def lines(setting: Setting, only: str = "") -> list[Line]:
    """Return a line for ours and for each side with ``only`` in its name."""
    names = [OURS, *PEERS, *(ABLATIONS if setting.ablations else ())]
    found: dict[str, list[Side]] = {name: [] for name in names if name == OURS or only in name}
    for seed in setting.seeds:
        for name, sides in found.items():
            sides.append(side(setting, name, seed))
            # Progress, since the table may come hours later.
            print(f"  seed {seed}, {name}: {sides[-1]}", flush=True)
    return [line(name, sides, found[OURS]) for name, sides in found.items()]


def job(setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    """Return the job that all sides run."""
    return {
        **jobs.trec6(folder, validation=setting.validation, copies=setting.copies),
        "search": {
            "space": {
                "num_virtual_tokens": list(setting.lengths),
                "learning_rate": {"loguniform": [0.01, 0.3]},
                "seed": [0, 1, 2],
            },
            "trials": setting.trials,
            "scheduler": "asha",
            "grace_steps": setting.grace,
            "seed": seed,
        },
        "train": {
            "steps": setting.steps,
            "batch_size": setting.batch,
            "evaluate_every": setting.every,
        },
    }


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
    """Return the median, or ``never`` if the target was not reached with every seed."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if len(found) == len(values) else "never"
