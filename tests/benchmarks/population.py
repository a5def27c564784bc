"""Population based training against random search: trial steps until the same accuracy.

Both sides begin with the same draws from the space and have the same number of steps in all. Random
search trains each trial to its end. With pbt, bad trials continue as copies of good trials with
another learning rate. Steps are counted instead of seconds, so that a busy machine changes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks import jobs, processes
from tests.benchmarks.measure import Line

SIDES = {"pbt": "pbt", "random": "fifo"}


@dataclass(frozen=True)
class Setting:
    """A search whose trials all run side by side and are compared every ``every`` steps."""

    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    steps: int = 240
    every: int = 40
    batch: int = 8
    validation: int = 200
    targets: tuple[float, ...] = (0.5, 0.55, 0.6)
    learning_rates: tuple[float, float] = (0.003, 0.3)


SETTINGS = {"real": Setting(), "small": Setting(seeds=(0,), steps=120)}


def lines(setting: Setting) -> list[Line]:
    """Return a line for each target accuracy, then a line for the best accuracies."""
    curves: dict[str, list[list[tuple[int, float]]]] = {side: [] for side in SIDES}
    for seed in setting.seeds:
        for side, scheduler in SIDES.items():
            curves[side].append(curve(_reports(setting, scheduler, seed)))
            print(f"  seed {seed}, {side}: {curves[side][-1]}", flush=True)
    return [*(target_line(curves, target) for target in setting.targets), best_line(curves)]


def _reports(setting: Setting, scheduler: str, seed: int) -> list[dict[str, Any]]:
    with TemporaryDirectory(prefix="bench-") as name:
        job = jobs.trec6(Path(name), validation=setting.validation)
        job |= {
            "search": {
                "space": {
                    "num_virtual_tokens": 20,
                    "learning_rate": {"loguniform": list(setting.learning_rates)},
                    "seed": list(range(setting.trials)),
                },
                "trials": setting.trials, "scheduler": scheduler, "seed": seed,
            },
            "train": {
                "steps": setting.steps,
                "batch_size": setting.batch,
                "evaluate_every": setting.every,
            },
            "resources": {"trials_per_worker": setting.trials},
            "registry": {"register_top": 0},
        }  # fmt: skip
        found = processes.run_in(name, "our_search", {"job": job}).found
        reports: list[dict[str, Any]] = found["reports"]
        return reports


def curve(reports: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the search's trial steps and best validation accuracy so far, after each round.

    The trials of a round are trained side by side, so a good trial is only found after all steps of
    the round.
    """
    at: dict[str, int] = {}
    rounds: dict[int, tuple[int, float]] = {}
    best = 0.0
    for report in reports:
        at[report["trial"]] = report["step"]
        best = max(best, report["score"])
        rounds[report["step"]] = sum(at.values()), best
    return list(rounds.values())


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Return the trial steps until the best accuracy reaches the target, or None."""
    return next((steps for steps, best in curve if best >= target), None)


def target_line(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], target: float) -> Line:
    steps = {side: [steps_to(one, target) for one in found] for side, found in curves.items()}
    both = [
        (ours, other)
        for ours, other in zip(steps["pbt"], steps["random"], strict=True)
        if ours and other is not None
    ]
    fewer = statistics.median(other / ours for ours, other in both) if both else float("nan")
    shown = {
        f"steps, {side}": ", ".join(str(one or "never") for one in found)
        for side, found in steps.items()
    }
    return Line(f"to accuracy {target:g}", {**shown, "random / pbt": fewer}, {"steps": steps})


def best_line(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Line:
    best = {side: [one[-1][1] for one in found] for side, found in curves.items()}
    shown = {side: ", ".join(f"{one:.3f}" for one in found) for side, found in best.items()}
    wins = sum(ours > other for ours, other in zip(best["pbt"], best["random"], strict=True))
    kept = {"best": best, "curves": curves}
    return Line(
        "best accuracy of each seed", {**shown, "pbt ahead": f"{wins} of {len(best['pbt'])}"}, kept
    )
