"""Tests of a difference between two prompts, against definitions of SciPy and scikit-learn."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest
from models import random_prompts, small_task, tiny_backbone
from scipy import stats
from sklearn import metrics as sklearn

from orchestrator.data.outcomes.confidence import Confidence, binomial_p, confidence, interval
from orchestrator.data.outcomes.rows import (
    BLEU_COUNTS,
    EXACT,
    F1,
    GIVEN,
    LOG_PROBS,
    NLL,
    ROUGE_L,
    TOKENS,
    TRUE,
    Measured,
    RowOutcomes,
    outcomes_of,
)
from orchestrator.data.outcomes.statistics import NEEDED, STATISTICS, statistic_of
from orchestrator.job.metrics import METRICS, names_of
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.text_metrics import row_scores, text_metrics

TASK_METRICS = {"labels": names_of("labels", "targets"), "texts": names_of("texts", "targets")}


def answers(true: Any, given: Any, confident: float = 0.8) -> RowOutcomes:
    """Outcomes on rows with two labels, where the given label has the same probability."""
    true, given = np.asarray(true), np.asarray(given)
    probs = np.where(np.arange(2) == given[:, None], confident, 1 - confident)
    return RowOutcomes({TRUE: true, GIVEN: given, LOG_PROBS: np.log(probs)})


def known(mine: RowOutcomes, champion: RowOutcomes, metric: str) -> Confidence:
    found = confidence(mine, champion, metric)
    assert found is not None
    return found


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (12, 11), (3, 20), (90, 40)])
def test_mcnemar_is_the_binomial_test_of_the_rows_that_one_alone_got_right(
    better: int, worse: int
) -> None:
    """The p value is SciPy's, and rows that both got right or wrong do not change it."""
    tosses = better + worse
    wanted = stats.binomtest(better, tosses).pvalue if tosses else 1.0
    assert binomial_p(better, worse) == pytest.approx(wanted, rel=1e-12)
    rows = 300
    mine, champion = np.ones(rows, int), np.ones(rows, int)
    champion[:better] = 0
    mine[better:tosses] = 0
    mine[200:], champion[200:] = 0, 0  # wrong in both
    found = known(answers([1] * rows, mine), answers([1] * rows, champion), "accuracy")
    assert (found.test, found.better, found.worse, found.rows) == ("McNemar", better, worse, rows)
    assert found.p_value == pytest.approx(wanted, rel=1e-12)
    assert found.low <= (better - worse) / rows <= found.high


def test_a_thousand_times_better_is_counted_without_overflow() -> None:
    """Thousands of rows give a p value at once, however small it is."""
    assert 0 <= binomial_p(9000, 1000) < 1e-300
    assert binomial_p(5000, 5000) == 1.0
    right, wrong = np.ones(9000, int), np.zeros(9000, int)
    assert (
        "p < 0.0001 (McNemar)"
        in known(answers(right, right), answers(right, wrong), "accuracy").clause()
    )


def test_two_rows_of_400_are_noise() -> None:
    """0.910 against 0.908 on 400 rows is noise, and the clause says so in numbers."""
    true = np.ones(400, int)
    mine, champion = true.copy(), true.copy()
    champion[:12] = 0
    mine[12:23] = 0
    mine[364 + 11 :], champion[364 + 11 :] = 0, 0
    found = known(answers(true, mine), answers(true, champion), "accuracy")
    assert not found.is_significant
    assert found.clause().startswith("12 rows better, 11 worse of 400, p = 1 (McNemar), 95 % ")


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    """The interval of a mean's difference is SciPy's percentile interval of the paired rows."""
    source = np.random.default_rng(5)
    champion = source.random(200)
    mine = np.clip(champion + source.normal(0.02, 0.1, 200), 0, 1)
    found = known(RowOutcomes({F1: mine}), RowOutcomes({F1: champion}), "f1")
    wanted = stats.bootstrap(
        (mine - champion,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert found.test == "paired bootstrap"
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.0015)
    assert found.p_value == pytest.approx(stats.ttest_rel(mine, champion).pvalue, abs=0.02)


def test_the_bootstrap_is_paired() -> None:
    """Rows differ much and prompts little: only pairs of the same rows show the difference."""
    rows = np.random.default_rng(3).random(200)
    found = known(RowOutcomes({F1: rows}), RowOutcomes({F1: rows - 0.01}), "f1")
    assert found.is_significant and found.low == pytest.approx(0.01) == found.high


@pytest.mark.parametrize("metric", ["macro_f1", "weighted_f1", "mcc", "roc_auc", "ece"])
def test_prompts_that_are_the_same_do_not_differ(metric: str) -> None:
    """Without any difference p is 1, for metrics that are no means over rows too."""
    source = np.random.default_rng(0)
    true = source.integers(0, 2, 60)
    mine = answers(true, np.where(source.random(60) < 0.8, true, 1 - true))
    found = known(mine, mine, metric)
    assert (found.p_value, found.low, found.high) == (1.0, 0.0, 0.0)


def test_macro_f1_differs_where_accuracy_does_not() -> None:
    """Finding rare labels at the price of as many frequent ones is no change of accuracy."""
    true = [0] * 90 + [1] * 10
    always, finds = [0] * 100, [1] * 9 + [0] * 81 + [1] * 9 + [0]
    mine, champion = answers(true, finds), answers(true, always)
    assert known(mine, champion, "accuracy").p_value == 1.0
    found = known(mine, champion, "macro_f1")
    difference = sklearn.f1_score(true, finds, average="macro") - sklearn.f1_score(
        true, always, average="macro"
    )
    assert found.is_significant and 0 < found.low < difference < found.high


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_can_be_resampled_within_seconds(metric: Any) -> None:
    """Each metric of the list has a function of rows; 2,000 rows take no more than seconds."""
    assert STATISTICS.keys() == NEEDED.keys() == {metric.name for metric in METRICS}
    source = np.random.default_rng(1)

    def outcomes() -> RowOutcomes:
        true = np.arange(2000) % 2
        given = np.where(source.random(2000) < 0.7, true, 1 - true)
        return RowOutcomes(
            {
                **answers(true, given).columns,
                EXACT: given == true,
                NLL: source.random(2000),
                TOKENS: np.full(2000, 3),
                ROUGE_L: source.random(2000),
                F1: source.random(2000),
                BLEU_COUNTS: np.tile([3, 2, 1, 1, 5, 4, 3, 2, 5, 6], (2000, 1)),
            }
        )

    started = time.process_time()
    found = known(outcomes(), outcomes(), metric.name)
    assert time.process_time() - started < 20
    assert 0 <= found.p_value <= 1 and found.low <= found.high


@pytest.mark.parametrize("kind", ["labels", "texts"])
def test_the_outcomes_of_an_evaluation_give_its_metrics_again(kind: str) -> None:
    """All metrics follow from the rows' outcomes, also after they were stored in a file."""
    texts = kind == "texts"
    task, backbone = small_task(None if texts else "several tokens", validation=30), tiny_backbone()
    split, decoding = task.splits["validation"], None
    if texts:
        references = [["the quick fox jumps over it", "spam"] for _ in split.inputs]
        split, decoding = _with_references(split, references), Decoding(8)
    prompts = random_prompts(backbone, [4, 1], seed=3)
    assert all(outcomes_of(it) is None for it in evaluate(backbone, prompts, split, task.encoder))
    for metrics in evaluate(backbone, prompts, split, task.encoder, decoding, confusion=True):
        kept = outcomes_of(metrics)
        assert kept is not None and kept.rows == 30
        for outcomes, tolerance in ((kept, 1e-9), (RowOutcomes.from_bytes(kept.to_bytes()), 1e-6)):
            assert outcomes is not None
            for name in TASK_METRICS[kind]:
                statistic = statistic_of(outcomes, name)
                assert statistic is not None
                assert statistic(np.arange(30)) == pytest.approx(metrics[name], abs=tolerance)


def _with_references(split: Any, references: list[list[str]]) -> Any:
    from dataclasses import replace

    return replace(split, references=references)


def test_rows_of_texts_add_up_to_the_texts_metrics() -> None:
    """BLEU, ROUGE-L and F1 follow from the rows, with empty texts and several references too."""
    texts = ["the cat sat on the mat", "", "a dog", "rain falls on the old red roof today"]
    references = [
        ["the cat sat on a mat", "a cat is on the mat"],
        ["nothing"],
        ["the dog"],
        ["rain falls on the old roof"],
    ]
    outcomes, wanted = row_scores(texts, references), text_metrics(texts, references)
    for name in ("bleu", "rouge_l", "f1"):
        statistic = statistic_of(outcomes, name)
        assert statistic is not None
        assert statistic(np.arange(4)) == pytest.approx(wanted[name], abs=1e-12)
    assert wanted["bleu"] > 0.1


def test_other_numbers_of_rows_and_unknown_metrics_are_not_compared() -> None:
    """Nothing is guessed without the same rows, the columns, or a metric of known definition."""
    one, other = answers([0, 1], [0, 1]), answers([0, 1, 1], [0, 1, 1])
    assert confidence(one, other, "accuracy") is None
    assert confidence(one, one, "loss") is None
    assert confidence(one, one, "costs:missed_spam") is None
    assert confidence(RowOutcomes({}), RowOutcomes({}), "accuracy") is None


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_interval_of_one_prompt_is_that_of_a_bootstrap(metric: str) -> None:
    """It agrees with SciPy's percentile bootstrap of the rows, and brackets the metric."""
    source = np.random.default_rng(3)
    true = source.integers(0, 2, 200)
    given = np.where(source.random(200) < 0.8, true, 1 - true)
    outcomes = answers(true, given)
    statistic = statistic_of(outcomes, metric)
    assert statistic is not None
    wanted = stats.bootstrap(
        (np.arange(200),), lambda rows: statistic(rows), vectorized=False, n_resamples=3000,
        method="percentile", random_state=1,
    ).confidence_interval  # fmt: skip
    low, high = interval(outcomes, metric) or (0.0, 0.0)
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=0.012)
    assert low < statistic(np.arange(200)) < high


def test_an_interval_is_unknown_without_the_columns() -> None:
    """No interval is guessed without the metric's columns, without rows or for own metrics."""
    one = answers([0, 1], [0, 1])
    assert interval(one, "loss") is None and interval(one, "costs:missed_spam") is None
    assert interval(RowOutcomes({}), "accuracy") is None


def test_outcomes_travel_with_metrics_from_a_worker() -> None:
    """A pickled result keeps its outcomes, and is equal to the plain metrics."""
    sent = Measured.with_outcomes({"accuracy": 0.5}, answers([0, 1], [0, 0]))
    received = pickle.loads(pickle.dumps(sent))
    found = outcomes_of(received)
    assert received == {"accuracy": 0.5} and found is not None and found.rows == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_damaged_file_of_outcomes_is_none(content: bytes) -> None:
    assert RowOutcomes.from_bytes(content) is None


def test_a_file_with_columns_of_other_shapes_is_none() -> None:
    """A file whose columns differ in length, type or dimensions holds no outcomes."""
    import io

    def stored(**columns: Any) -> RowOutcomes | None:
        stream = io.BytesIO()
        np.savez(stream, **columns)
        return RowOutcomes.from_bytes(stream.getvalue())

    whole = np.zeros(3, np.int32)
    assert stored(label=whole, given=whole) is not None
    assert stored(label=whole, given=whole[:2]) is None
    assert stored(label=whole.astype(float)) is None
    assert stored(label=np.zeros((3, 2), np.int32)) is None
    assert stored(label=np.array([{}, {}], dtype=object)) is None
