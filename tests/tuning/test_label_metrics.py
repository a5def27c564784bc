"""Metrics of labels equal scikit-learn's, for any answers and probabilities."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_prompts, small_task, tiny_backbone
from sklearn import metrics as sklearn

from orchestrator.data.outcomes.label_metrics import (
    CALIBRATION_BINS,
    calibration_counts,
    calibration_error,
    count_metrics,
    per_class,
    roc_auc,
)
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.reports import confusion_counts

EXACT = {"rel": 0, "abs": 1e-12}
ANSWERS = st.integers(2, 5).flatmap(
    lambda labels: st.lists(
        st.tuples(st.integers(0, labels - 1), st.integers(0, labels - 1)), min_size=1, max_size=60
    ).map(lambda pairs: (labels, pairs))
)


def counted(labels: int, pairs: list[tuple[int, int]]) -> Any:
    counts = np.zeros((labels, labels), dtype=np.int64)
    for true, given_label in pairs:
        counts[true, given_label] += 1
    return counts


@given(ANSWERS)
@settings(deadline=None, max_examples=200)
def test_metrics_of_counts_are_scikit_learns(answers: tuple[int, list[tuple[int, int]]]) -> None:
    """F1 and Matthews correlation equal scikit-learn's, also where a class is absent."""
    labels, pairs = answers
    true, said = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a single label
        wanted = {
            "macro_f1": sklearn.f1_score(true, said, average="macro", zero_division=0),
            "weighted_f1": sklearn.f1_score(true, said, average="weighted", zero_division=0),
            "mcc": sklearn.matthews_corrcoef(true, said),
        }
    assert count_metrics(counted(labels, pairs)) == pytest.approx(wanted, **EXACT)


@given(ANSWERS)
@settings(deadline=None, max_examples=100)
def test_figures_of_each_label_are_scikit_learns(
    answers: tuple[int, list[tuple[int, int]]],
) -> None:
    """Precision, recall, F1 and support of every label equal scikit-learn's."""
    labels, pairs = answers
    true, said = zip(*pairs, strict=True)
    wanted = sklearn.precision_recall_fscore_support(
        true, said, labels=range(labels), zero_division=0
    )
    found = per_class(counted(labels, pairs))
    for name, values in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
        assert [one[name] for one in found] == pytest.approx(list(values), **EXACT)


@st.composite
def judged_rows(draw: st.DrawFn) -> tuple[list[int], Any]:
    """Rows of every label, with probabilities of which many are equal."""
    labels = draw(st.integers(2, 4))
    more = draw(st.lists(st.integers(0, labels - 1), min_size=1, max_size=40))
    true = [*range(labels), *more]
    weights = st.lists(st.integers(1, 4), min_size=labels, max_size=labels)
    rows = np.array([draw(weights) for _ in true], dtype=float)
    return true, rows / rows.sum(1, keepdims=True)


@given(judged_rows())
@settings(deadline=None, max_examples=200)
def test_the_area_under_the_curve_is_scikit_learns(judged: tuple[list[int], Any]) -> None:
    """ROC AUC equals scikit-learn's, for two labels and one-vs-rest, with ties."""
    true, scores = judged
    two = scores.shape[1] == 2
    wanted = sklearn.roc_auc_score(
        true, scores[:, 1] if two else scores, multi_class="ovr", average="macro"
    )
    assert roc_auc(true, scores) == pytest.approx(wanted, **EXACT)
    assert roc_auc(true, np.log(scores)) == pytest.approx(wanted, **EXACT)


def test_equal_scores_have_an_area_of_one_half() -> None:
    """A model that gives every row the same scores ranks no pair in the right order."""
    assert roc_auc([0, 1, 1, 0], np.full((4, 2), 0.5)) == 0.5


def test_the_area_of_absent_labels_is_undefined() -> None:
    """There is no area without rows of a label, or with rows of one label only."""
    assert roc_auc([1, 1, 1], np.full((3, 2), 0.5)) is None
    assert roc_auc([0, 1, 1], np.full((3, 3), 1 / 3)) is None


def test_scores_that_are_not_numbers_give_no_number() -> None:
    """NaN among the scores gives NaN, so that the trial counts as diverged."""
    scores = np.array([[0.5, 0.5], [math.nan, math.nan]])
    assert math.isnan(roc_auc([0, 1], scores) or 0)
    assert math.isnan(calibration_error(calibration_counts(scores.max(1), np.array([True, True]))))


def test_answers_of_one_label_have_no_correlation() -> None:
    """Matthews correlation is 0 if all rows have one label, or got one."""
    assert count_metrics(np.array([[90, 0], [10, 0]]))["mcc"] == 0
    assert count_metrics(np.array([[90, 10], [0, 0]]))["mcc"] == 0


@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.sampled_from([0.2, 1 / 3, 0.6, 1.0]), st.booleans()),
        min_size=1,
        max_size=50,
    ),
    st.integers(0, 50),
)
@settings(deadline=None, max_examples=100)
def test_calibration_error_is_as_guo_defines_it(rows: list[tuple[float, bool]], cut: int) -> None:
    """The error is the weighted distance in each bin, and batches of rows add up."""
    wanted = 0.0
    for number in range(CALIBRATION_BINS):
        inside = [
            (confidence, right)
            for confidence, right in rows
            if max(1, math.ceil(confidence * CALIBRATION_BINS)) == number + 1
        ]
        if inside:
            mean = sum(confidence for confidence, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            wanted += len(inside) / len(rows) * abs(accuracy - mean)
    sums = sum(
        calibration_counts(
            np.array([confidence for confidence, _ in part]),
            np.array([right for _, right in part], dtype=bool),
        )
        for part in (rows[:cut], rows[cut:])
    )
    assert calibration_error(sums) == pytest.approx(wanted, **EXACT)


def test_a_sure_and_right_model_is_calibrated() -> None:
    """Probability 1 and all rows right is an error of 0; all rows wrong is an error of 1."""
    sure = np.ones(4)
    assert calibration_error(calibration_counts(sure, np.full(4, True))) == 0
    assert calibration_error(calibration_counts(sure, np.full(4, False))) == 1


@pytest.mark.parametrize("answers", ["one token", "several tokens", "prefix"])
@pytest.mark.parametrize("limit", [30, None])
def test_an_evaluation_reports_scikit_learns_metrics(answers: str, limit: int | None) -> None:
    """All metrics of labels are reported for each prompt of a pack, from its own answers.

    Without being asked for, only the usual ones are; the one that is asked for comes with them.
    """
    task, backbone = small_task(answers, validation=30), tiny_backbone()
    split = task.splits["validation"]
    prompts = random_prompts(backbone, [4, 1, 9], seed=3)
    full = evaluate(backbone, prompts, split, task.encoder, confusion=True, max_tokens=limit)
    for metrics in full:
        counts = confusion_counts(metrics, 2)
        pairs = [
            (true, said) for true in (0, 1) for said in (0, 1) for _ in range(counts[true][said])
        ]
        true, said = zip(*pairs, strict=True)
        assert len(pairs) == 30 and 0 < metrics["roc_auc"] < 1 and 0 < metrics["ece"] < 1
        assert metrics["accuracy"] == sklearn.accuracy_score(true, said)
        assert metrics["macro_f1"] == pytest.approx(
            sklearn.f1_score(true, said, average="macro", zero_division=0), **EXACT
        )
        assert metrics["mcc"] == pytest.approx(sklearn.matthews_corrcoef(true, said), **EXACT)
    assert len({metrics["roc_auc"] for metrics in full}) == 3  # each prompt has its own scores
    for name in ("macro_f1", "weighted_f1", "mcc", "roc_auc", "ece"):
        asked = evaluate(backbone, prompts, split, task.encoder, metric=name)
        for metrics, whole in zip(asked, full, strict=True):
            assert set(metrics) == {"accuracy", "exact_match", "loss", name}
            assert metrics[name] == pytest.approx(whole[name], abs=1e-6)
    alone = evaluate(backbone, prompts[1:2], split, task.encoder, metric="roc_auc")
    assert alone[0]["roc_auc"] == pytest.approx(full[1]["roc_auc"], abs=1e-6)
    threads = Threads.of(2, backbone.model, backbone.device)
    shared = evaluate(backbone, prompts, split, task.encoder, confusion=True, threads=threads)
    for metrics, whole in zip(shared, full, strict=True):
        assert metrics == pytest.approx(whole, abs=1e-6)
