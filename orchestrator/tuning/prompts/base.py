"""The base class of prompts: modules whose parameters yield the tensors put in front of rows.

Shapes: P virtual tokens, H width, L layers. To add a method, write one file with a class and add
one entry to ``prompts.METHODS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.job.spec import MethodName
from orchestrator.models.backbone import PromptTensors


@dataclass(frozen=True)
class Method:
    """A job's method, and how the prompt is computed from the method's parameters."""

    name: MethodName = "prompt_tuning"
    reparameterization: Literal["none", "mlp", "lstm"] = "none"
    hidden_size: int | None = None
    """Hidden width of the reparameterisation; None means the default of the method's paper."""
    inside: bool = False
    """True if the template says where the virtual tokens stand."""


class Prompt(nn.Module, ABC):
    """A trial's learnable state.

    Parameters are float32. ``forward`` is differentiable and deterministic.
    """

    @abstractmethod
    def forward(self) -> PromptTensors:
        """Compute the prompt as inference uses it, which is also what an artifact stores."""

    @torch.no_grad()
    def named(self) -> dict[str, Tensor]:
        """Return the prompt's tensors by name, without gradients."""
        tensors: PromptTensors = self()
        return tensors.named()


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Seed torch's random numbers on the CPU inside the block, and restore their state after it.

    Yields a generator with the same seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


class Offset(nn.Module):
    """A network whose output [..., N] is added to a fixed start.

    The papers initialise the network at random, so that the prompt can't start from real words. If
    a start is given, the network's last layer begins at zero: before the first step the output is
    exactly the start, and the network learns the difference.
    """

    start: Tensor | None

    def __init__(self, network: nn.Module, last: nn.Linear, start: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("start", start)
        if start is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.network(inputs)
        return output if self.start is None else self.start + output
