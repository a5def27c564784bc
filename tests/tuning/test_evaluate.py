"""Metrics against a naive reference: one row at a time, without padding or cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import (
    VERBALIZERS,
    alone,
    alone_nll,
    encoder_for,
    random_ids,
    random_prompts,
    small_task,
    tiny_backbone,
    tiny_model,
)
from torch import Tensor

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.models.backbone import Backbone
from orchestrator.tuning import evaluate as evaluate_module
from orchestrator.tuning.evaluate import evaluate

Metrics = dict[str, float]


def naive(backbone: Backbone, prompt: Tensor | None, split: Encoded, encoder: Encoder) -> Metrics:
    """Evaluate each row by itself.

    Rank the answers, decode greedily, and sum the target's negative log-likelihood.
    """
    right = exact = 0
    nll, tokens = 0.0, 0
    for ids, target, label in zip(split.inputs, split.targets, split.labels, strict=True):
        scores = [
            -float(alone_nll(backbone, prompt, ids, answer)) for answer in encoder.scored_answers
        ]
        right += bool(scores) and scores.index(max(scores)) == label
        exact += greedy(backbone, prompt, ids, len(target)) == target
        nll += float(alone_nll(backbone, prompt, ids, target))
        tokens += len(target)
    ranked = {"accuracy": right / len(split)} if encoder.answers else {}
    return {**ranked, "exact_match": exact / len(split), "loss": nll / tokens}


def greedy(backbone: Backbone, prompt: Tensor | None, ids: Sequence[int], length: int) -> list[int]:
    made: list[int] = []
    for _ in range(length):
        made.append(int(alone(backbone, prompt, [*ids, *made], [0])[-1].argmax()))
    return made


def compare(
    backbone: Backbone, split: Encoded, encoder: Encoder, bare: bool = True
) -> list[Metrics]:
    prompts = random_prompts(backbone, [4, 1, 9], seed=3)
    with torch.no_grad():
        got = evaluate(backbone, prompts, split, encoder)
        for prompt, metrics in zip(prompts, got, strict=True):
            assert metrics == pytest.approx(naive(backbone, prompt, split, encoder), rel=1e-6)
        if bare:
            (zero_shot,) = evaluate(backbone, None, split, encoder)
            assert zero_shot == pytest.approx(naive(backbone, None, split, encoder), rel=1e-6)
    return got


@pytest.mark.parametrize("answers", [*VERBALIZERS, None], ids=str)
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_metrics_equal_rows_alone(answers: str | None, prompt_once: bool) -> None:
    """Metrics equal those of single rows, for each kind of answers and for generation.

    Answers have one token or several, or one answer begins another.
    """
    task = small_task(answers, validation=12)
    got = compare(tiny_backbone(prompt_once=prompt_once), task.splits["validation"], task.encoder)
    assert answers is None or any(0 < metrics["accuracy"] < 1 for metrics in got)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "mamba"])
def test_metrics_on_the_plain_path(family: str) -> None:
    """Families without the prompt-once path have exact metrics, with and without prompts."""
    task = small_task(validation=5)
    compare(tiny_backbone(family), task.splits["validation"], task.encoder)


@pytest.mark.parametrize("limit", [1, 40, 150, 10_000])
def test_the_size_of_forwards_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics do not depend on how many rows share a forward."""
    monkeypatch.setattr(evaluate_module, "MAX_TOKENS", limit)
    task = small_task(validation=6)
    compare(tiny_backbone(), task.splits["validation"], task.encoder, bare=False)


@pytest.mark.parametrize("prefix", [False, True], ids=["apart", "prefix"])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_the_end_token_ranks_only_where_one_answer_begins_another(
    prefix: bool, prompt_once: bool
) -> None:
    """Answers are ranked by their own tokens.

    Only where one answer is a prefix of another are they ranked with the end token.
    """
    backbone = tiny_backbone(prompt_once=prompt_once)
    (prompt,) = random_prompts(backbone, [6], seed=8)
    encoder = encoder_for("several tokens")
    encoder.answers = [
        [place + 5, *ids] for place, ids in enumerate(random_ids([1, 2, 1, 2, 1, 1, 2, 1], seed=6))
    ]
    if prefix:
        encoder.answers[3] = [*encoder.answers[0], 9]
    ended = [[*ids, encoder.end_id] for ids in encoder.answers]
    inputs = random_ids([5, 9, 3, 7, 4, 4, 8, 2, 6, 6], seed=4)

    def best(ids: list[int], answers: list[list[int]]) -> int:
        scores = [-float(alone_nll(backbone, prompt, ids, answer)) for answer in answers]
        return scores.index(max(scores))

    with torch.no_grad():
        labels = [best(ids, encoder.scored_answers) for ids in inputs]
        assert labels != [best(ids, encoder.answers if prefix else ended) for ids in inputs]
        (metrics,) = evaluate(
            backbone, [prompt], Encoded(inputs, [ended[label] for label in labels], labels), encoder
        )
    assert metrics["accuracy"] == 1


def greedy_answers(backbone: Backbone, prompt: Tensor, encoder: Encoder, labels: bool) -> Encoded:
    """Return a split of which greedy decoding gets some targets right and others wrong by a token.

    A random model's answers are arbitrary, so the targets are made from its own output.
    """
    inputs = random_ids([5, 9, 3, 7], seed=4)
    made = [greedy(backbone, prompt, ids, 3) for ids in inputs]
    if labels:
        # The answers are the model's output for rows 0 and 1; the end token is its next token for
        # row 0.
        encoder.answers, encoder.end_id = [made[0][:2], made[1][:2]], made[0][2]
        return Encoded(
            inputs,
            [[*encoder.answers[place % 2], encoder.end_id] for place in range(4)],
            [0, 1, 0, 1],
        )
    targets = [made[0], made[1][:2], [*made[2][:2], made[2][2] + 1], [made[3][0] + 1, *made[3][1:]]]
    return Encoded(inputs, targets, [-1] * 4)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "generation"])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_exact_match_is_greedy_decoding(labels: bool, prompt_once: bool) -> None:
    """A row matches when greedy decoding gives its whole target, to the end token.

    One different token is no match.
    """
    backbone = tiny_backbone(prompt_once=prompt_once)
    (prompt,) = random_prompts(backbone, [6], seed=8)
    encoder = encoder_for("several tokens" if labels else None)
    with torch.no_grad():
        split = greedy_answers(backbone, prompt, encoder, labels)
        (metrics,) = evaluate(backbone, [prompt], split, encoder)
        wanted = naive(backbone, prompt, split, encoder)
    assert metrics == pytest.approx(wanted, rel=1e-6)
    assert 0 < metrics["exact_match"] < 1


def test_exact_match_is_what_generate_gives() -> None:
    """transformers' greedy generate finds the same rows right."""
    backbone = tiny_backbone(dtype=torch.float32)
    model: Any = tiny_model("llama", torch.float32)
    (prompt,) = random_prompts(backbone, [6], seed=8)
    encoder = encoder_for(None)
    with torch.no_grad():
        split = greedy_answers(backbone, prompt, encoder, labels=False)
        matched = 0
        for ids, target in zip(split.inputs, split.targets, strict=True):
            embeds = torch.cat(
                [prompt[None], backbone.embed(torch.tensor([ids], device=backbone.device))], dim=1
            )
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            made = model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=len(target),
                do_sample=False,
                eos_token_id=-1,
            )
            matched += made[0].tolist() == target
        (metrics,) = evaluate(backbone, [prompt], split, encoder)
    assert metrics["exact_match"] == matched / len(split) == 0.5


def test_each_prompt_meets_each_row() -> None:
    """A prompt's metrics do not depend on the other prompts or on their order."""
    backbone = tiny_backbone()
    task = small_task(validation=9)
    prompts = random_prompts(backbone, [4, 1, 9], seed=3)
    with torch.no_grad():
        together = evaluate(backbone, prompts, task.splits["validation"], task.encoder)
        for prompt, metrics in zip(prompts, together, strict=True):
            (single,) = evaluate(backbone, [prompt], task.splits["validation"], task.encoder)
            assert single == pytest.approx(metrics, rel=1e-6)
        turned = evaluate(backbone, prompts[::-1], task.splits["validation"], task.encoder)
        assert turned[0] == pytest.approx(together[2], rel=1e-6)


def test_evaluation_leaves_no_gradient() -> None:
    """Evaluating a prompt that is being tuned records nothing for a backward."""
    backbone = tiny_backbone()
    (prompt,) = random_prompts(backbone, [4])
    task = small_task(validation=3)
    evaluate(backbone, [prompt], task.splits["validation"], task.encoder)
    assert prompt.grad is None and prompt.requires_grad
