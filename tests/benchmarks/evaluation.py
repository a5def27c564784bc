"""Evaluation of K prompts together and one by one, and sharing of the input between answers.

Answers have several tokens. The input runs once for all answers of a row, or once for each answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.models.backbone import CausalBackbone, default_device
from orchestrator.models.scoring import answer_scores
from orchestrator.tuning.evaluate import evaluate
from tests.benchmarks.measure import Line, compare
from tests.benchmarks.subjects import (
    SIZES,
    backbone_of,
    make_encoder,
    make_model,
    make_prompts,
    make_rows,
)


@dataclass(frozen=True)
class Setting:
    """Size of the model, and numbers of prompts, rows, answers and tokens of an answer."""

    size: str = "6x192"
    prompts: tuple[int, ...] = (4, 16)
    rows: int = 32
    shortest: int = 20
    longest: int = 40
    prompt: int = 20
    answers: tuple[int, ...] = (2, 6)
    answer_tokens: int = 3
    pairs: int = 3
    device: torch.device = field(default_factory=default_device)


class OnceAnAnswer(CausalBackbone):
    """A backbone that does not continue from a row's KV cache.

    Every answer runs the whole input again.
    """

    @property
    def continues(self) -> bool:
        return False


def lines(setting: Setting) -> list[Line]:
    model = make_model(SIZES[setting.size], setting.device)
    packed = [_packed(setting, backbone_of(model), count) for count in setting.prompts]
    shared = [
        _shared(setting, backbone_of(model), backbone_of(model, OnceAnAnswer), n)
        for n in setting.answers
    ]
    return [*packed, *shared]


def _packed(setting: Setting, backbone: CausalBackbone, count: int) -> Line:
    split, encoder = task(setting, backbone, 2, 1)
    prompts = make_prompts(backbone, count, setting.prompt)

    def together() -> None:
        evaluate(backbone, prompts, split, encoder)

    def one_by_one() -> None:
        for prompt in prompts:
            evaluate(backbone, [prompt], split, encoder)

    return compare(
        f"{count} prompts together against one by one", together, one_by_one, setting.pairs
    ).line()


def _shared(setting: Setting, once: CausalBackbone, repeated: CausalBackbone, answers: int) -> Line:
    name = f"{answers} answers of {setting.answer_tokens} tokens: input once against once an answer"
    split, encoder = task(setting, once, answers, setting.answer_tokens)
    ours, peer = (
        lambda kind=kind: scores(setting, kind, split, encoder) for kind in (once, repeated)
    )
    return compare(name, ours, peer, setting.pairs).line()


def task(
    setting: Setting, backbone: CausalBackbone, answers: int, tokens: int
) -> tuple[Encoded, Encoder]:
    """Return rows whose answers differ in the first token, and their encoder."""
    texts = [
        " ".join(f"w{1 + place + 10 * token}" for token in range(tokens))
        for place in range(answers)
    ]
    encoder = make_encoder(backbone.tokenizer, texts)
    split = make_rows(
        setting.rows, len(backbone.table), setting.shortest, setting.longest, encoder.answers
    )
    return split, encoder


@torch.inference_mode()
def scores(
    setting: Setting, backbone: CausalBackbone, split: Encoded, encoder: Encoder
) -> list[torch.Tensor]:
    """Return the log-probabilities [C] of the answers of every row, behind one prompt."""
    prepared = backbone.prepare(make_prompts(backbone, 1, setting.prompt))
    count = len(split)
    return answer_scores(
        backbone, prepared, split.inputs, [0] * count, [encoder.scored_answers] * count
    )
