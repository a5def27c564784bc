"""Prefix tuning: learns keys and values for every layer (Li & Liang 2021, section 4).

Shapes: P virtual tokens, L layers, N = L x 2 x kv heads x head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import PromptTensors
from orchestrator.tuning.prompts.base import Method, Offset, Prompt, seeded
from orchestrator.tuning.prompts.inits import InitContext, initial_prefix, random_uniform

HIDDEN = 512  # Li & Liang, section 5.3; 800 for XSum


class DirectSite(nn.Module):
    """One attention site's keys and values, trained directly.

    ``keys_values`` is [L, 2, kv heads, P, head width].
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.keys_values = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.keys_values


class MlpSite(nn.Module):
    """One attention site's keys and values, computed from a smaller matrix ``tokens`` [P, H].

    The MLP is Linear-Tanh-Linear.
    """

    def __init__(
        self, shape: torch.Size, length: int, width: int, hidden: int, start: Tensor | None
    ) -> None:
        super().__init__()
        self.layers, self.heads, self.head_width, self.length = shape[0], shape[2], shape[4], length
        self.tokens = nn.Parameter(torch.randn(length, width))
        last = nn.Linear(hidden, math.prod(shape) // shape[3])
        network = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last)
        self.mlp = Offset(network, last, None if start is None else _flat(start))

    def forward(self) -> Tensor:
        flat: Tensor = self.mlp(self.tokens)
        return flat.view(self.length, self.layers, 2, self.heads, self.head_width).permute(
            1, 2, 3, 0, 4
        )


def _flat(keys_values: Tensor) -> Tensor:
    """Reshape [L, 2, kv heads, P, head width] to [P, N]."""
    return keys_values.permute(3, 0, 1, 2, 4).flatten(1)


class Prefix(Prompt):
    """A prefix: learned keys and values for each of the model's attention sites."""

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.sites = nn.ModuleDict(dict(sites))

    @classmethod
    def create(cls, method: Method, spec: TrialSpec, context: InitContext) -> Prefix:
        """Create a trial's prefix before its first step.

        With init ``random``, everything is drawn at random. With any other init, the prefix starts
        as in ``initial_prefix``.
        """
        shapes, length = context.prefix_shapes(), spec.num_virtual_tokens
        start = {} if spec.init == "random" else initial_prefix(spec, context)
        sites: dict[str, nn.Module] = {}
        with seeded(spec.seed) as generator:
            for site, shape in shapes.items():
                if method.reparameterization == "mlp":
                    hidden = method.hidden_size or HIDDEN
                    sites[site] = MlpSite(shape, length, context.shape[1], hidden, start.get(site))
                else:
                    random_start = random_uniform((*shape[:3], length, shape[4]), generator)
                    sites[site] = DirectSite(start.get(site, random_start))
        return cls(sites)

    def forward(self) -> PromptTensors:
        return PromptTensors(prefixes={name: site() for name, site in self.sites.items()})
