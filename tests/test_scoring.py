"""Scores of answers: every way to compute them agrees with one unpadded row at a time."""

from __future__ import annotations

import pytest
import torch
from models import alone_nll, encoder_for, random_ids, random_prompts, tiny_backbone
from torch import Tensor

from orchestrator.models.backbone import Backbone
from orchestrator.models.scoring import answer_scores, answer_tokens, target_log_probs

INPUTS = random_ids([6, 1, 11, 3])
OWNER = [1, 0, 1, 2]
LENGTHS = [4, 7, 1]
# Rows have different numbers and lengths of answers; some answers are prefixes of others.
LONG = [
    [[5], [5, 6], [5, 6, 7, 8]],
    [[9, 9]],
    [[3], [4]],
    [[10, 11, 12], [10], [13, 14], [15], [16]],
]
SINGLE = [[[5], [6]], [[7]], [[8], [9], [10], [11]], [[5], [12]]]


def directly(
    backbone: Backbone, prompts: list[Tensor] | None, answers: list[list[list[int]]]
) -> list[Tensor]:
    return [
        torch.stack(
            [-alone_nll(backbone, prompts and prompts[owner], ids, answer) for answer in choices]
        )
        for ids, owner, choices in zip(INPUTS, OWNER, answers, strict=True)
    ]


def assert_scores_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("answers", [SINGLE, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["cache", "plain"])
@pytest.mark.parametrize("with_prompts", [True, False], ids=["prompts", "bare"])
def test_scores_equal_single_rows(
    answers: list[list[list[int]]], prompt_once: bool, with_prompts: bool
) -> None:
    """All ways to score give each row's own log-probabilities.

    These are one-token answers, answers scored with the cache, and the plain path.
    """
    backbone = tiny_backbone(prompt_once=prompt_once)
    prompts = random_prompts(backbone, LENGTHS) if with_prompts else None
    owner = OWNER if with_prompts else [0] * len(OWNER)
    with torch.no_grad():
        prepared = backbone.prepare(prompts) if prompts else None
        assert_scores_equal(
            answer_scores(backbone, prepared, INPUTS, owner, answers),
            directly(backbone, prompts, answers),
        )


@pytest.mark.parametrize("prompt_once", [True, False], ids=["cache", "plain"])
def test_one_token_answers_score_alike_among_longer_ones(prompt_once: bool) -> None:
    """An answer's score does not depend on the path that its neighbours require."""
    backbone = tiny_backbone(prompt_once=prompt_once)
    with torch.no_grad():
        prepared = backbone.prepare(random_prompts(backbone, LENGTHS))
        short = answer_scores(backbone, prepared, INPUTS, OWNER, SINGLE)
        longer = [[*choices, [3, 3, 3]] for choices in SINGLE]
        mixed = answer_scores(backbone, prepared, INPUTS, OWNER, longer)
        assert_scores_equal([scores[:-1] for scores in mixed], short)


def test_a_sliding_window_scores_as_single_rows() -> None:
    """Windows shorter than prompt and row are scored exactly, with and without a prompt."""
    backbone = tiny_backbone("mistral")
    prompts = random_prompts(backbone, LENGTHS)
    with torch.no_grad():
        got = answer_scores(backbone, backbone.prepare(prompts), INPUTS, OWNER, LONG)
        assert_scores_equal(got, directly(backbone, prompts, LONG))
        assert_scores_equal(
            answer_scores(backbone, None, INPUTS, [0] * len(OWNER), LONG),
            directly(backbone, None, LONG),
        )


def test_answers_that_begin_another_are_ended() -> None:
    """ "A" and "A b" both get an end token, so the shorter one does not win by its length."""
    encoder = encoder_for("prefix")
    short, longer = encoder.answers
    assert longer[: len(short)] == short
    assert encoder.scored_answers == [[*short, encoder.end_id], [*longer, encoder.end_id]]
    apart = encoder_for("several tokens")
    assert apart.scored_answers == apart.answers


def test_scores_of_all_ended_answers_are_probabilities_of_different_texts() -> None:
    """Probabilities of ended answers sum to at most 1: none contains another's."""
    backbone = tiny_backbone()
    encoder = encoder_for("prefix")
    with torch.no_grad():
        prepared = backbone.prepare(random_prompts(backbone, LENGTHS))
        scores = answer_scores(
            backbone, prepared, INPUTS, OWNER, [encoder.scored_answers] * len(INPUTS)
        )
    assert all(float(one.exp().sum()) <= 1 for one in scores)


def test_answer_tokens_say_what_greedy_decoding_does() -> None:
    """A token is marked greedy exactly where it is the most likely one.

    Positions beyond the answer's end are marked greedy, too.
    """
    backbone = tiny_backbone()
    prompts = random_prompts(backbone, LENGTHS)
    answers = []
    with torch.no_grad():
        prepared = backbone.prepare(prompts)
        for ids, owner in zip(INPUTS, OWNER, strict=True):
            made: list[int] = []
            for _ in range(3):
                logits, _ = backbone.teacher_forced(
                    backbone.prepare([prompts[owner]]), [[*ids, *made]], [[0]], [0]
                )
                made.append(int(logits[0, -1].argmax()))
            answers.append(
                [made, made[:2], [made[0], (made[1] + 1) % 300, made[2]], [(made[0] + 1) % 300]]
            )
        log_probs, greedy = answer_tokens(backbone, prepared, INPUTS, OWNER, answers)
    assert greedy.view(len(INPUTS), 4, 3)[:, 0].all() and greedy.view(len(INPUTS), 4, 3)[:, 1].all()
    assert greedy.view(len(INPUTS), 4, 3)[:, 2, :2].tolist() == [[True, False]] * len(INPUTS)
    assert greedy.view(len(INPUTS), 4, 3)[:, 3].tolist() == [[False, True, True]] * len(INPUTS)
    assert (log_probs.view(len(INPUTS), 4, 3)[:, 3, 1:] == 0).all()


def test_targets_stand_at_the_right_edge() -> None:
    """Targets end in the same column; positions before a shorter target predict nothing."""
    backbone = tiny_backbone()
    with torch.no_grad():
        logits, targets = backbone.teacher_forced(None, [[5, 6], [7]], [[8], [9, 10, 11]], [0, 0])
    assert targets.tolist() == [[-100, -100, 8], [9, 10, 11]]
    assert logits.shape == (2, 3, len(backbone.table))
    log_probs = target_log_probs(logits, targets)
    assert log_probs[0, :2].tolist() == [0, 0] and (log_probs[1] < 0).all()
