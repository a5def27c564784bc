"""Bottleneck adapters (Houlsby et al. 2019, section 2.1).

An adapter is two small layers after the last projection of each attention and each feed-forward
part, before the residual connection is added. The paper also trains the layer normalisations. Here
they stay frozen, so that only the adapters need to be stored for a task. PEFT has no such adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.change import WeightChange
from orchestrator.tuning.prompts.base import seeded

ENDS = frozenset(
    {
        "o_proj",
        "c_proj",
        "out_proj",
        "o",
        "wo",
        "down_proj",
        "fc2",
        "dense",
        "dense_4h_to_h",
        "out_lin",
        "lin2",
    }
)
"""Names in various model families of the last projection of an attention or feed-forward part."""
Hook: TypeAlias = Callable[[nn.Module, object, Tensor], Tensor]
STD = 0.001  # of initial weights: the adapter is almost the identity (section 3.6)


class Adapters(WeightChange):
    """Adapters after some projections of width H: each turns h into h + up(gelu(down(h)))."""

    def __init__(self, ends: dict[str, nn.Module], width: int, bottleneck: int) -> None:
        learned: dict[str, nn.Parameter] = {}
        for name in ends:
            learned[f"{name}.down.weight"] = nn.Parameter(torch.randn(bottleneck, width) * STD)
            learned[f"{name}.down.bias"] = nn.Parameter(torch.zeros(bottleneck))
            learned[f"{name}.up.weight"] = nn.Parameter(torch.randn(width, bottleneck) * STD)
            learned[f"{name}.up.bias"] = nn.Parameter(torch.zeros(width))
        super().__init__(learned)
        self._ends = list(ends.values())
        self._handles: list[RemovableHandle] = []

    @classmethod
    def create(cls, spec: TrialSpec, backbone: Backbone) -> Adapters:
        width, bottleneck = backbone.table.shape[1], spec.bottleneck
        assert bottleneck is not None  # the spec's own default
        ends = block_ends(backbone.model, width)
        if not ends:
            kind = backbone.info.model_type
            raise BadInput(
                f"method adapter finds no attention or feed-forward part of width {width} "
                f"in a {kind} model",
                f"use method lora; adapters know projections called {', '.join(sorted(ENDS))}",
            )
        with seeded(spec.seed):
            return cls(ends, width, bottleneck)

    def _put_in(self) -> None:
        parameters = list(self.parameters())
        for index, module in enumerate(self._ends):
            self._handles.append(
                module.register_forward_hook(_adapter(*parameters[4 * index : 4 * index + 4]))
            )

    def _take_out(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def block_ends(model: nn.Module, width: int) -> dict[str, nn.Module]:
    """Find the projections to the model's width that end a part of one of its blocks, by name."""
    blocks = [
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    return {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ENDS
        and name.startswith(tuple(blocks))
        and _out_width(module) == width
    }


def _out_width(module: nn.Module) -> object:
    """Return a projection's output width, which GPT-2's layers call ``nf``."""
    return getattr(module, "out_features", getattr(module, "nf", None))


def _adapter(down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Hook:
    def after(module: nn.Module, inputs: object, hidden: Tensor) -> Tensor:
        inner = nn.functional.gelu(nn.functional.linear(hidden.to(down), down, down_bias))
        return hidden + nn.functional.linear(inner, up, up_bias).to(hidden)

    return after
