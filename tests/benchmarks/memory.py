"""Peak memory of a packed step, in its own process: ``python -m tests.benchmarks.memory JSON``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from orchestrator.models.backbone import default_device
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks.measure import in_fresh_process
from tests.benchmarks.subjects import SIZES, batches, make_backbone, make_prompts, make_rows

MEGABYTE = 2**20


@dataclass(frozen=True)
class Step:
    """A step of ``trials`` prompts with ``rows`` rows each, of a model named in ``SIZES``."""

    size: str
    trials: int
    rows: int
    shortest: int
    longest: int
    prompt: int


def measured(step: Step) -> dict[str, float]:
    """Measure a step in a fresh process.

    Returns megabytes: ``weights``, and ``above``, which the step takes beyond the memory held
    before it.
    """
    return in_fresh_process("tests.benchmarks.memory", asdict(step))


def measure_here(step: Step) -> dict[str, float]:
    """Measure a step in this process.

    Earlier peaks of this process are included where the system can't reset them.
    """
    device = default_device()
    backbone = make_backbone(SIZES[step.size], device)
    count = step.trials * step.rows
    split = make_rows(count, SIZES[step.size].vocabulary, step.shortest, step.longest)
    prompts = make_prompts(backbone, step.trials, step.prompt)
    packed_gradients(backbone, prompts[:1], [[0]], split)  # allocations of the first step only
    before = forget_peak(device)
    packed_gradients(backbone, prompts, batches(step.trials, step.rows, count), split)
    weights = sum(parameter.nbytes for parameter in backbone.model.parameters())
    return {"weights": weights / MEGABYTE, "above": (peak(device) - before) / MEGABYTE}


def forget_peak(device: torch.device) -> int:
    """Reset the device's memory peak and return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return forget_peak_of_process()


def forget_peak_of_process() -> int:
    """Reset this process's memory peak and return the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(json.dumps(measure_here(Step(**json.loads(sys.argv[1])))))
