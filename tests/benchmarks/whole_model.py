"""Memory of tuning all weights: LOMO and model tuning beside inference on the same batch.

Each is measured in its own process: ``python -m tests.benchmarks.whole_model JSON``. Megabytes are
those that the process holds at its peak beyond what it held before it made the model, so that they
include the model's weights. ``times inference`` compares with a forward without gradients.

"lomo, update alone" trains the model's own weights. A trial of a search trains copies ("a trial of
lomo"): the model that it started from stays in memory for the next trial. The peaks of a step are
measured; checkpoints come on top, and their size is in the last column.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch: sets how OpenMP threads wait

# isort: split
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import MethodName, SearchSpec, TrainSpec
from orchestrator.models.backbone import CausalBackbone, default_device
from orchestrator.models.scoring import target_log_probs
from orchestrator.tuning.baselines.lomo import fused_update
from orchestrator.tuning.engine import Task
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.memory import Memory
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.update_rules import Sgd
from tests.benchmarks.measure import Line, in_fresh_process
from tests.benchmarks.memory import MEGABYTE
from tests.benchmarks.subjects import SIZES, make_backbone, make_encoder, make_rows

MODULE = "tests.benchmarks.whole_model"
INFERENCE = "inference"
RATE = 0.001


@dataclass(frozen=True)
class Setting:
    """A model named in ``SIZES``, its number format, and the rows of a step."""

    size: str = "100M"
    dtype: str = "float32"
    rows: int = 4
    tokens: int = 64
    steps: int = 2


TOY = Setting("toy", rows=2, tokens=8)


@dataclass(frozen=True)
class Case:
    """What is measured in one process: a name of ``CASES``, and the setting."""

    name: str
    setting: Setting


def lines(setting: Setting, only: str = "") -> list[Line]:
    """Return a line for each case whose name has ``only`` in it, and for inference."""
    chosen = [name for name in CASES if only in name or name == INFERENCE]
    found = {
        name: in_fresh_process(MODULE, {"name": name, "setting": asdict(setting)})
        for name in chosen
    }
    base = found[INFERENCE]["peak"]
    return [
        Line(
            name,
            {
                "weights, MB": peaks["weights"],
                "peak, MB": peaks["peak"],
                "times inference": peaks["peak"] / base,
                "checkpoint, MB": peaks["checkpoint"],
            },
        )
        for name, peaks in found.items()
    ]


def measure_here(case: Case) -> dict[str, float]:
    """Measure one case in this process, in megabytes."""
    setting, device = case.setting, default_device()
    dtype = getattr(torch, setting.dtype)
    make_backbone(SIZES["toy"], device)  # what is allocated for the first model only
    memory = Memory(device)
    before = memory.start_over()
    backbone = make_backbone(SIZES[setting.size], device, dtype)
    gc.collect()
    memory.start_over()
    checkpoint = CASES[case.name](backbone, setting)
    weights = sum(parameter.nbytes for parameter in backbone.model.parameters())
    return {
        "weights": weights / MEGABYTE,
        "peak": (memory.peak() - before) / MEGABYTE,
        "checkpoint": checkpoint / MEGABYTE,
    }


def _infer(backbone: CausalBackbone, setting: Setting) -> int:
    for _ in range(setting.steps):
        with torch.no_grad():
            _loss(backbone, setting)
    return 0


def _update_alone(backbone: CausalBackbone, setting: Setting) -> int:
    parameters: list[nn.Parameter] = list(backbone.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(setting.steps):
        assert fused_update(_loss(backbone, setting), parameters, Sgd(0.0, 0.0), RATE)
    return 0


def _loss(backbone: CausalBackbone, setting: Setting) -> Tensor:
    split = make_rows(setting.rows, SIZES[setting.size].vocabulary, setting.tokens)
    logits, targets = backbone.teacher_forced(None, split.inputs, split.targets, [0] * setting.rows)
    return -target_log_probs(logits, targets).sum(1).mean()


def _trial(method: MethodName, optimizer: str) -> Callable[[CausalBackbone, Setting], int]:
    """Return a measurement of a trial's steps in the engine, without evaluation."""

    def steps(backbone: CausalBackbone, setting: Setting) -> int:
        split = make_rows(setting.rows, SIZES[setting.size].vocabulary, setting.tokens)
        task = Task(make_encoder(backbone.tokenizer), {"train": split}, method=Method(method))
        train = TrainSpec.model_validate(
            {"optimizer": optimizer, "batch_size": setting.rows, "steps": 50}
        )
        engine = make_engine(backbone, task, train, SearchSpec(metric="loss"), 1)
        engine.seat("trial", TrialSpec("", None, 0, RATE, 0))
        slot = engine.slots["trial"]
        for _ in range(setting.steps):
            engine.step([slot])
        assert not slot.broken
        return sum(tensor.nbytes for tensor in slot.state().tensors.values())

    return steps


CASES: dict[str, Callable[[CausalBackbone, Setting], int]] = {
    INFERENCE: _infer,
    "lomo, update alone": _update_alone,
    "a trial of lomo": _trial("lomo", "sgd"),
    "a trial of model tuning, sgd": _trial("model_tuning", "sgd"),
    "a trial of model tuning, adamw": _trial("model_tuning", "adamw"),
}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure_here(Case(given["name"], Setting(**given["setting"])))))
