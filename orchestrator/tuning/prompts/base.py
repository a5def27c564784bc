"""What every prompt method is: a module of learnable parameters that yields what stands in front of rows.

Shapes: P virtual tokens, H width, L layers. A new method is one file with a class, and one entry in
``prompts.METHODS``.
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
    """A job's method and how its parameters make the prompt."""

    name: MethodName = "prompt_tuning"
    reparameterization: Literal["none", "mlp", "lstm"] = "none"
    hidden_size: int | None = None
    """Width of the reparameterisation; None is the paper's."""
    inside: bool = False
    """The template says where virtual tokens stand."""


class Prompt(nn.Module, ABC):
    """A trial's learnable state. Parameters are float32; ``forward`` is differentiable and deterministic."""

    @abstractmethod
    def forward(self) -> PromptTensors:
        """The prompt as inference uses it: what an artifact keeps."""

    @torch.no_grad()
    def named(self) -> dict[str, Tensor]:
        """The tensors of that, by their names."""
        made: PromptTensors = self()
        return made.named()


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Within, torch's random numbers on the CPU follow from the seed alone; yields a generator that does too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


class Offset(nn.Module):
    """A network's output [..., N] on top of a fixed start: exactly the start before the first step.

    The papers draw the network at random, which can't begin at real words; with a start the network's last layer begins
    at zero and learns the difference.
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
        made: Tensor = self.network(inputs)
        return made if self.start is None else self.start + made
