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
                name: nn.Parameter(original.detach().to(dtype or original.dtype, copy=True))
                for name, original in self._own.items()
            }
        )
        learned = {
            id(original): learned_parameter
            for original, learned_parameter in zip(
                self._own.values(), self.parameters(), strict=True
            )
        }
        # All modules that hold a parameter: a tied parameter is in several.
        self._places = [
            (module, name, original, learned[id(original)])
            for module in model.modules()
            for name, original in module._parameters.items()
            if original is not None
        ]

    @classmethod
    def create(cls, spec: TrialSpec, backbone: Backbone) -> ModelTuning:
        return cls(backbone.model)

    def _put_in(self) -> None:
        for module, name, _, learned in self._places:
            module._parameters[name] = learned

    def _take_out(self) -> None:
        for module, name, original, _ in self._places:
            module._parameters[name] = original
