"""Share of an accelerator's peak that a packed step uses, at 100 million and 1 billion parameters.

The measure is model FLOPs utilisation with 4 N operations a token (``operations``, attention left
out). ``MFU`` counts every computed token, padding included; ``useful`` leaves padding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orchestrator.data.batches import length_groups
from orchestrator.data.encoding import Encoded
from orchestrator.models.backbone import CausalBackbone
from orchestrator.tuning.step import Limits, packed_gradients
from tests.benchmarks.measure import Line, Skipped, compare
from tests.benchmarks.operations import Weights
from tests.benchmarks.subjects import SIZES, batches, make_backbone, make_prompts, make_rows

GIGABYTE = 2**30
TERA = 1e12
LIMITS = Limits(max_tokens=32_768)

# Dense bfloat16 TFLOPS from the makers' data sheets. The first key that occurs in the device's name
# is used, so "H100 PCIe" stands before "H100".
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}


@dataclass(frozen=True)
class Setting:
    """Models, numbers of trials, and rows of each trial."""

    device: torch.device
    peak: float  # TFLOPS
    sizes: tuple[str, ...] = ("100M", "1B")
    trials: tuple[int, ...] = (1, 8, 32)
    rows: int = 16
    shortest: int = 40
    longest: int = 100
    prompt: int = 20
    pairs: int = 5
    limits: Limits = LIMITS


def accelerator(peak: float | None) -> Setting:
    """Return the setting of this machine's accelerator.

    Raises Skipped without an accelerator, or if its peak is neither known nor given.
    """
    if not torch.cuda.is_available():
        raise Skipped("torch has no accelerator here; --toy runs it on the CPU at toy size")
    return Setting(torch.device("cuda"), peak or known_peak(torch.cuda.get_device_name()))


def known_peak(device: str) -> float:
    """Return the dense bfloat16 TFLOPS of a device by its name.

    Raises Skipped for a device that PEAK_TFLOPS does not list.
    """
    for name, peak in PEAK_TFLOPS.items():
        if name in device:
            return peak
    raise Skipped(f"the peak of {device!r} is unknown; give it in TFLOPS with --peak")


def lines(setting: Setting) -> list[Line]:
    found = []
    for size in setting.sizes:
        backbone = make_backbone(SIZES[size], setting.device, torch.bfloat16)
        found += [_line(setting, size, backbone, trials) for trials in setting.trials]
    return found


def _line(setting: Setting, size: str, backbone: CausalBackbone, trials: int) -> Line:
    count = trials * setting.rows
    split = make_rows(count, len(backbone.table), setting.shortest, setting.longest)
    prompts = make_prompts(backbone, trials, setting.prompt)
    numbers = batches(trials, setting.rows, count)

    def packed() -> None:
        packed_gradients(backbone, prompts, numbers, split, setting.limits)

    def one_by_one() -> None:
        for prompt, batch in zip(prompts, numbers, strict=True):
            packed_gradients(backbone, [prompt], [batch], split, setting.limits)

    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    comparison = compare(
        f"{size}, {trials} trials of {setting.rows} rows", packed, one_by_one, setting.pairs
    )
    weights = Weights.of(backbone.model)
    useful = needed(weights, split, numbers, setting.prompt)
    together = computed(weights, split, numbers, setting)
    alone = sum(computed(weights, split, [batch], setting) for batch in numbers)
    ours, peer = (
        milliseconds / 1000 * setting.peak * TERA
        for milliseconds in (comparison.ours_ms, comparison.peer_ms)
    )
    shown: dict[str, float | str] = {
        "MFU, %": 100 * together / ours,
        "useful, %": 100 * useful / ours,
        "alone MFU, %": 100 * alone / peer,
        "alone useful, %": 100 * useful / peer,
        "peak, GB": torch.cuda.max_memory_allocated() / GIGABYTE
        if setting.device.type == "cuda"
        else "no device",
    }
    return comparison.line(**shown)


def needed(
    weights: Weights, split: Encoded, rows_of_trials: Sequence[Sequence[int]], prompt: int
) -> float:
    """Return the operations of one step of all trials, padding left out."""
    rows = [row for rows in rows_of_trials for row in rows]
    head = sum(len(split.targets[row]) for row in rows)
    body = sum(len(split.inputs[row]) + len(split.targets[row]) - 1 for row in rows)
    return weights.operations(body + prompt * len(rows_of_trials), head, 0)


def computed(
    weights: Weights, split: Encoded, rows_of_trials: Sequence[Sequence[int]], setting: Setting
) -> float:
    """Return the operations of one packed step, padding of its forwards included."""
    rows = [row for rows in rows_of_trials for row in rows]
    limits, lengths = setting.limits, [split.lengths[row] for row in rows]
    body = head = 0
    for group in length_groups(
        lengths, limits.forward_overhead, limits.max_tokens, limits.max_rows
    ):
        of_group = [rows[place] for place in group]
        body += len(group) * max(
            len(split.inputs[row]) + len(split.targets[row]) - 1 for row in of_group
        )
        head += len(group) * max(len(split.targets[row]) for row in of_group)
    return weights.operations(body + setting.prompt * len(rows_of_trials), head, 0)
