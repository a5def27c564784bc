"""A training step of one trial: ours against PEFT's on the same model, rows, prompt and threads.

Both sides compute the same loss and gradient, as the tests prove. PEFT puts the prompt in front of
every row and computes logits at every position. Ours runs the prompt once and only computes the
logits of the target. ``operations`` counts how much faster ours could be by the number of
operations; the last column is the share of that speedup that is reached. The share can exceed 100
%, since work other than matrix products, and memory, also cost PEFT more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from orchestrator.data.encoding import Encoded
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import CausalBackbone, default_device
from orchestrator.tuning.prompts import InitContext, Method, Prompt, make_prompt
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks import operations
from tests.benchmarks.measure import Line, compare
from tests.benchmarks.subjects import MIDDLE, Size, backbone_of, make_model, make_rows

TARGET = 2  # tokens of a row's target
HIDDEN = 512  # width of P-tuning's network


@dataclass(frozen=True)
class Case:
    """A line of the table: a method and its number of virtual tokens."""

    method: Literal["prompt_tuning", "prefix_tuning", "p_tuning"]
    length: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.length} virtual tokens"


CASES = (
    *(Case("prompt_tuning", length) for length in (1, 20, 100)),
    Case("prefix_tuning", 20),
    Case("p_tuning", 20),
)


@dataclass(frozen=True)
class Setting:
    """Size of the model and rows, and the cases to measure."""

    size: Size = MIDDLE
    inputs: int = 32
    rows: int = 32
    pairs: int = 3
    cases: tuple[Case, ...] = CASES
    device: torch.device = field(default_factory=default_device)


def lines(setting: Setting) -> list[Line]:
    torch.manual_seed(0)
    model = make_model(setting.size, setting.device)
    backbone = backbone_of(model)
    # Rows of one length, so that PEFT's left padding plays no part.
    rows = make_rows(setting.rows, setting.size.vocabulary, setting.inputs)
    return [_line(setting, case, backbone, rows) for case in setting.cases]


def _line(setting: Setting, case: Case, backbone: CausalBackbone, rows: Encoded) -> Line:
    weights = operations.Weights.of(backbone.model)
    shape = (weights, case.length, setting.inputs, TARGET, setting.rows)
    prefix = case.method == "prefix_tuning"
    allowed = operations.repeated(*shape, prefix=prefix) / operations.once(*shape, prefix=prefix)
    ours = our_step(backbone, our_prompt(backbone, case), rows)
    comparison = compare(case.name, ours, peft_step(backbone, case, rows), setting.pairs)
    reached = comparison.ratios()[1] / allowed
    return comparison.line(**{"allowed": allowed, "share reached": f"{reached:.0%}"})


def our_prompt(backbone: CausalBackbone, case: Case) -> Prompt:
    """Return a prompt with the same parameters as PEFT's.

    A prefix has no network; P-tuning has three linear layers.
    """
    network: Literal["none", "mlp"] = "mlp" if case.method == "p_tuning" else "none"
    method = Method(case.method, network, HIDDEN if case.method == "p_tuning" else None)
    spec = TrialSpec("random", None, case.length, 0.1, 0)
    return make_prompt(method, spec, InitContext.of(backbone, [[1], [2]])).to(backbone.device)


def our_step(backbone: CausalBackbone, prompt: Prompt, rows: Encoded) -> Callable[[], float]:
    """Return a function that computes loss and gradient of one trial."""

    def step() -> float:
        prompt.zero_grad()
        return packed_gradients(backbone, [prompt()], [list(range(len(rows)))], rows)[0]

    return step


def peft_step(backbone: CausalBackbone, case: Case, rows: Encoded) -> Callable[[], float]:
    """Return a function that computes the same with PEFT, around the same weights."""
    tuned = peft_model(backbone, case)
    ids = torch.tensor(
        [[*row, *target] for row, target in zip(rows.inputs, rows.targets, strict=True)]
    )
    ids = ids.to(backbone.device)
    labels = ids.clone()
    labels[:, :-TARGET] = -100

    def step() -> float:
        tuned.zero_grad()
        loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        return float(loss.detach())

    return step


def peft_model(backbone: CausalBackbone, case: Case) -> nn.Module:
    """Wrap the backbone's model in PEFT, with a newly drawn prompt."""
    import peft

    common: dict[str, Any] = {
        "task_type": peft.TaskType.CAUSAL_LM,
        "num_virtual_tokens": case.length,
    }
    config = {
        "prompt_tuning": lambda: peft.PromptTuningConfig(**common),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(**common),
        "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=HIDDEN, **common),
    }[case.method]()
    wrapped: nn.Module = peft.get_peft_model(backbone.model, config).to(backbone.device)
    return wrapped
