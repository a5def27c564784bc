"""K trials in shared forwards against the same trials one by one, and the memory that packing adds.

The frozen weights are held once. A further trial adds the activations of its rows, as much as the
same rows would add to a single trial.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from orchestrator.models.backbone import CausalBackbone, default_device
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks import memory
from tests.benchmarks.measure import Line, compare
from tests.benchmarks.subjects import SIZES, batches, make_backbone, make_prompts, make_rows


@dataclass(frozen=True)
class Setting:
    """Size of the model, numbers of trials, and rows of each trial."""

    size: str = "6x192"
    trials: tuple[int, ...] = (1, 8, 32)
    rows: tuple[int, ...] = (4, 16)
    shortest: int = 20
    longest: int = 40
    prompt: int = 20
    pairs: int = 3
    device: torch.device = field(default_factory=default_device)


def speed_lines(setting: Setting) -> list[Line]:
    """Return the steps a second of each trial, packed and one by one."""
    backbone = make_backbone(SIZES[setting.size], setting.device)
    return [
        _speed(setting, backbone, trials, rows)
        for rows in setting.rows
        for trials in setting.trials
    ]


def _speed(setting: Setting, backbone: CausalBackbone, trials: int, rows: int) -> Line:
    count = trials * rows
    split = make_rows(count, SIZES[setting.size].vocabulary, setting.shortest, setting.longest)
    prompts = make_prompts(backbone, trials, setting.prompt)
    numbers = batches(trials, rows, count)

    def packed() -> None:
        packed_gradients(backbone, prompts, numbers, split)

    def one_by_one() -> None:
        for prompt, batch in zip(prompts, numbers, strict=True):
            packed_gradients(backbone, [prompt], [batch], split)

    comparison = compare(f"{trials} trials of {rows} rows", packed, one_by_one, setting.pairs)
    return comparison.line(**{"trial steps/s": 1000 * trials / comparison.ours_ms})


def memory_lines(setting: Setting) -> list[Line]:
    """Return the megabytes above the weights of a packed step.

    The step of one trial with the rows of all trials is measured too.
    """
    found = []
    for rows in setting.rows:
        alone = _above(setting, 1, rows)
        for trials in setting.trials:
            packed = alone if trials == 1 else _above(setting, trials, rows)
            whole = alone if trials == 1 else _above(setting, 1, trials * rows)
            shown = {
                "weights, MB": packed["weights"],
                "step, MB": packed["above"],
                "one trial, MB": whole["above"],
            }
            added = (
                (packed["above"] - alone["above"]) / (trials - 1) if trials > 1 else alone["above"]
            )
            found.append(
                Line(
                    f"memory, {trials} trials of {rows} rows", {**shown, "added a trial, MB": added}
                )
            )
    return found


def _above(setting: Setting, trials: int, rows: int) -> dict[str, float]:
    step = memory.Step(
        setting.size, trials, rows, setting.shortest, setting.longest, setting.prompt
    )
    return memory.measured(step)
