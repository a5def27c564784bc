"""Prompt tuning: learns the virtual tokens' embeddings directly (Lester et al. 2021, section 2)."""

from __future__ import annotations

from torch import Tensor, nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import PromptTensors
from orchestrator.tuning.prompts.base import Method, Prompt
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt


class SoftPrompt(Prompt):
    """A soft prompt: ``prompt`` [P, H] holds the embeddings of the virtual tokens."""

    def __init__(self, start: Tensor, inside: bool = False) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start)
        self.inside = inside

    @classmethod
    def create(cls, method: Method, spec: TrialSpec, context: InitContext) -> SoftPrompt:
        return cls(initial_prompt(spec, context), method.inside)

    def forward(self) -> PromptTensors:
        return PromptTensors(self.prompt, inside=self.inside)
