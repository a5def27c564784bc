"""Class weights: their values, and the weighted loss in packed steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import alone_nll, random_prompts, small_task, tiny_backbone
from sklearn.utils.class_weight import compute_sample_weight

from orchestrator.data.class_weights import row_weights
from orchestrator.data.template import Verbalizer
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.step import packed_gradients

VERBALIZER = Verbalizer(("ham", "spam", "odd"), (" h", " s", " o"))
TASK = small_task(train=20)
SPLIT = TASK.splits["train"]
LENGTHS, ROWS = [6, 1, 11], [[3, 8, 0, 17], [3, 5], [19, 19, 2, 4, 6, 7, 9]]
WEIGHTS = [0.25 + 3.5 * label for label in SPLIT.labels]


def test_balanced_weights_are_scikit_learns() -> None:
    """Labels that no training row has do not count."""
    labels = [0, 0, 0, 0, 0, 2]
    found = row_weights("balanced", labels, VERBALIZER)
    assert found == pytest.approx(compute_sample_weight("balanced", labels))
    assert found == pytest.approx([0.6] * 5 + [3.0])


def test_a_label_without_a_weight_has_weight_1() -> None:
    """Labels are matched by meaning, so 1 and "1" are the same one."""
    assert row_weights({"spam": 5.0}, [0, 1, 2], VERBALIZER) == [1.0, 5.0, 1.0]
    numbers = Verbalizer((0, 1), (" h", " s"))
    assert row_weights({"1": 2.5}, [1, 0], numbers) == [2.5, 1.0]


def weighted_loss(prompt: Any, rows: Sequence[int], reduction: str) -> Any:
    """Compute one trial's loss row by row."""
    backbone = tiny_backbone()
    losses = [
        WEIGHTS[row] * alone_nll(backbone, prompt, SPLIT.inputs[row], SPLIT.targets[row])
        for row in rows
    ]
    whole = {
        "token_mean": sum(WEIGHTS[row] * len(SPLIT.targets[row]) for row in rows),
        "sum_per_row": sum(WEIGHTS[row] for row in rows),
        "sum": 1.0,
    }[reduction]
    return torch.stack(losses).sum() / whole


@pytest.mark.parametrize("reduction", ["token_mean", "sum_per_row", "sum"])
def test_packed_trials_have_their_own_weighted_loss(reduction: Any) -> None:
    """Loss and gradient of each packed trial are the weighted ones of its own rows."""
    backbone = tiny_backbone()
    prompts = [random_prompts(backbone, [length], seed=length)[0] for length in LENGTHS]
    losses = packed_gradients(
        backbone, prompts, ROWS, SPLIT, reduction=reduction, row_weights=WEIGHTS
    )
    for prompt, rows, loss in zip(prompts, ROWS, losses, strict=True):
        own = prompt.detach().clone().requires_grad_()
        wanted = weighted_loss(own, rows, reduction)
        (gradient,) = torch.autograd.grad(wanted, own)
        assert loss == pytest.approx(wanted.item(), rel=2e-6)
        most = float(gradient.abs().max())
        torch.testing.assert_close(prompt.grad, gradient, rtol=2e-6, atol=2e-6 * most)


def test_equal_weights_change_nothing() -> None:
    """A mean that is weighted by one number is the plain mean."""
    backbone = tiny_backbone()
    (prompt,) = random_prompts(backbone, [6])
    plain = packed_gradients(backbone, [prompt], [ROWS[2]], SPLIT)
    same = packed_gradients(backbone, [prompt], [ROWS[2]], SPLIT, row_weights=[7.0] * len(SPLIT))
    assert same == pytest.approx(plain, rel=1e-6)


def test_the_engine_trains_with_the_jobs_weights() -> None:
    """A heavy label changes the training loss; the validation loss stays unweighted."""
    losses = []
    for weights in (None, {1: 50.0}, "balanced"):
        train = TrainSpec(steps=1, batch_size=8, evaluate_every=1, class_weights=weights)
        engine = make_engine(tiny_backbone(), TASK, train, SearchSpec(), 1)
        engine.seat("t", TrialSpec("random", None, 3, 0.1, 0))
        losses.append(engine.round()[0].train_loss)
    assert len(set(np.round(losses, 9))) == 3
