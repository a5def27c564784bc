"""Rotary position factors that depend on each row's own length.

transformers chooses a LongRoPE model's factors by the largest position in the batch, so a short row
beside a long one gets the factors of long rows. Here the model's own rotary module is called
separately for the rows on each side of the switch. Position ids must not count padding.

Shapes: B rows, T columns, D rotary width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput

# Rotary modules keep the factors of their last call, and threads share the modules.
_LOCK = threading.Lock()


class RowwiseRotary(nn.Module):
    """A model's rotary module, called once for the rows of each side of the switches."""

    def __init__(self, rotary: nn.Module, switches: Sequence[int]) -> None:
        super().__init__()
        self.rotary = rotary
        self.switches = tuple(switches)

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [B, T, D] of position ids [B, T], each row as if it were alone."""
        lengths = position_ids.amax(1) + 1
        sides = torch.stack([lengths > switch for switch in self.switches]).sum(0)
        groups = [(sides == side).nonzero()[:, 0] for side in sides.unique().tolist()]
        with _LOCK:
            if len(groups) == 1:
                return self._call(x, position_ids, *args, **kwargs)
            parts = [self._call(x, position_ids[rows], *args, **kwargs) for rows in groups]
        order = torch.cat(groups).argsort()
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines)[order], torch.cat(sines)[order]

    def _call(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        factors: tuple[Tensor, Tensor] = self.rotary(x, position_ids, *args, **kwargs)
        return factors


def install_rowwise(model: nn.Module, switches: Sequence[int]) -> None:
    """Give each row of the model's forwards its own position factors.

    A model whose rotary modules are wrapped already stays as it is. Raises BadInput for a model
    whose rotary modules are not those of transformers.
    """
    rotary_modules = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _has_longrope(child)
    ]
    if not rotary_modules:
        raise BadInput(
            f"a {type(model).__name__} scales its positions by the longest row of a batch "
            "(LongRoPE), and its rotary module is not known: a row's result would depend on the "
            "rows beside it",
            "set base_model.allow_remote_code to false where transformers knows the model, or "
            "choose another model",
        )
    for parent, name, child in rotary_modules:
        if not isinstance(parent, RowwiseRotary):
            setattr(parent, name, RowwiseRotary(child, switches))


def _has_longrope(module: nn.Module) -> bool:
    rope_type = getattr(module, "rope_type", None)
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return "longrope" in types
