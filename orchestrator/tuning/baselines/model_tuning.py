"""Model tuning: all of the model's parameters are learned (what Lester et al. 2021 compare prompts with).

They are copies in float32, whatever the model's own numbers are, so that small steps are not lost to rounding.
"""

from __future__ import annotations

from torch import nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning.baselines.change import Change


class ModelTuning(Change):
    """A copy of every parameter, in the place of the model's own while it works."""

    def __init__(self, model: nn.Module) -> None:
        self._own = dict(model.named_parameters())
        super().__init__(
            {name: nn.Parameter(own.detach().float().clone()) for name, own in self._own.items()}
        )
        learned = {
            id(own): mine for own, mine in zip(self._own.values(), self.parameters(), strict=True)
        }
        # Every place of a parameter: tied ones have several.
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
