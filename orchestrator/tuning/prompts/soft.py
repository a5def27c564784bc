"""Prompt tuning: the virtual tokens' embeddings themselves are learned (Lester et al. 2021, section 2)."""

from __future__ import annotations

from torch import Tensor, nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import PromptTensors
from orchestrator.tuning.prompts.base import Method, Prompt
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt


class SoftPrompt(Prompt):
    """``prompt`` [P, H]."""

    def __init__(self, start: Tensor, inside: bool = False) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start)
        self.inside = inside

    @classmethod
    def create(cls, method: Method, spec: TrialSpec, context: InitContext) -> SoftPrompt:
        return cls(initial_prompt(spec, context), method.inside)

    def forward(self) -> PromptTensors:
        return PromptTensors(self.prompt, inside=self.inside)
