"""Model tuning: learns all of the model's parameters (Lester et al. 2021 compare prompts with it).

The trained parameters are float32 copies, whatever the model's own number format is, so that small
steps are not lost to rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.change import WeightChange


class ModelTuning(WeightChange):
    """A copy of every parameter, which replaces the model's own while the change is applied."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = torch.float32) -> None:
        """Copy the parameters in the number format ``dtype``, or in their own if it is None."""
        self._own = dict(model.named_parameters())
        super().__init__(
            {
                name: nn.Parameter(own.detach().to(dtype or own.dtype, copy=True))
                for name, own in self._own.items()
            }
        )
        learned = {
            id(own): mine for own, mine in zip(self._own.values(), self.parameters(), strict=True)
        }
        # All modules that hold a parameter: a tied parameter is in several.
        self._places = [
            (module, name, own, learned[id(own)])
            for module in model.modules()
            for name, own in module._parameters.items()
            if own is not None
        ]

    @classmethod
    def create(cls, spec: TrialSpec, backbone: Backbone) -> ModelTuning:
        return cls(backbone.model)

    def _put_in(self) -> None:
        for module, name, _, mine in self._places:
            module._parameters[name] = mine

    def _take_out(self) -> None:
        for module, name, own, _ in self._places:
            module._parameters[name] = own
