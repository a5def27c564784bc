"""Classification of a mixed batch, in which each row has its own prompt and its own answers.

Shapes: B rows, C answers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.models.backbone import Backbone
from orchestrator.models.scoring import answer_scores
from orchestrator.serving.prompts.served_prompt import ServedPrompt, stack_prompts


@torch.inference_mode()
def answer_probs(
    backbone: Backbone, prompts: Sequence[ServedPrompt], inputs: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return for each of B rows the probabilities [C] of its prompt's answers, which sum to one."""
    stacked, prompt_of_row = stack_prompts(prompts)
    answers = [prompt.answers for prompt in prompts]
    scores = answer_scores(backbone, stacked, inputs, prompt_of_row, answers)
    probs: list[list[float]] = [row.double().softmax(0).tolist() for row in scores]
    return probs
