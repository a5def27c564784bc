"""Metrics of the user's own: what they are called with, and how a bad one is reported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import own_metrics
import pytest
from models import random_prompts, small_task, tiny_backbone

from orchestrator.errors import BadInput
from orchestrator.job.metrics import MetricFailed, custom_function
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.make import make_engine

TRAIN = TrainSpec(steps=2, batch_size=4, evaluate_every=1)


def test_a_function_gets_labels_and_their_probabilities_in_the_order_of_the_rows() -> None:
    """Its value is reported under its name, for each prompt of a pack."""
    task, backbone = small_task(validation=9), tiny_backbone()
    split, name = task.splits["validation"], "own_metrics:share_of_right"
    prompts = random_prompts(backbone, [4, 9], seed=3)
    own_metrics.CALLS.clear()
    found = evaluate(backbone, prompts, split, task.encoder, max_tokens=60, metric=name)
    assert [metrics[name] for metrics in found] == [metrics["accuracy"] for metrics in found]
    assert len(own_metrics.CALLS) == 2
    for predictions, references, scores in own_metrics.CALLS:
        assert references == split.labels and scores.shape == (9, 2)
        assert np.allclose(scores.sum(1), 1) and list(scores.argmax(1)) == predictions


def test_a_function_gets_texts_and_references_where_texts_are_generated() -> None:
    """Without a verbalizer the predictions are generated texts, and there are no scores."""
    task, backbone = small_task(None, validation=4), tiny_backbone()
    split = replace(task.splits["validation"], references=[["a"], ["b", "c"], ["d"], ["e"]])
    name = "own_metrics:exact_texts"
    own_metrics.CALLS.clear()
    (metrics,) = evaluate(backbone, None, split, task.encoder, Decoding(3), metric=name)
    ((predictions, references, scores),) = own_metrics.CALLS
    assert metrics[name] == 0 and scores is None and references == split.references
    assert all(isinstance(text, str) for text in predictions) and "bleu" in metrics


def test_a_search_ranks_by_a_function_in_either_direction() -> None:
    """A cost that falls is better with mode min; its worst score is far above any cost."""
    search = SearchSpec(metric="own_metrics:cost", mode="min")
    engine = make_engine(tiny_backbone(), small_task(), TRAIN, search, 1)
    engine.seat("t", TrialSpec("random", None, 3, 0.1, 0))
    (report,) = engine.round()
    assert report.score == report.metrics["own_metrics:cost"] >= 0
    assert engine._is_better({search.metric: 3, "loss": 1.0}, {search.metric: 4, "loss": 1.0})
    assert search.ranked_by.worst == 1e30


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_number", "returned nan"),
        ("endless", "returned inf"),
        ("nothing", "failed: TypeError"),
        ("broken", "failed: KeyError: 'spam'"),
    ],
)
def test_a_function_without_a_finite_number_is_an_error(name: str, reason: str) -> None:
    """The trial does not count as diverged: the error names the function and what it returned."""
    search = SearchSpec(metric=f"own_metrics:{name}")
    engine = make_engine(tiny_backbone(), small_task(), TRAIN, search, 1)
    engine.seat("t", TrialSpec("random", None, 3, 0.1, 0))
    with pytest.raises(MetricFailed, match=reason) as failure:
        engine.round()
    assert f"own_metrics:{name}" in failure.value.message and failure.value.hint


def test_a_diverged_prompt_is_not_given_to_a_function() -> None:
    """Scores that are no numbers give the value NaN, as other metrics do."""
    task, backbone = small_task(), tiny_backbone()
    (prompt,) = random_prompts(backbone, [4])
    name = "own_metrics:broken"
    split = task.splits["validation"]
    (metrics,) = evaluate(backbone, [prompt * float("nan")], split, task.encoder, metric=name)
    assert np.isnan(metrics[name]) and np.isnan(metrics["loss"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_anywhere:f", "ModuleNotFoundError"),
        ("own_metrics:missing", "own_metrics has no missing"),
        ("own_metrics:too_few", "can't be called with predictions, references, scores"),
        ("own_metrics:no_function", "can't be called with"),
        ("failing_module_of_a_test:f", "ZeroDivisionError"),
    ],
)
def test_a_function_that_can_not_be_used_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing module, function or argument is refused before a worker trains."""
    (tmp_path / "failing_module_of_a_test.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=reason) as refusal:
        custom_function(name)
    assert refusal.value.message.startswith(f"search.metric: {name}") and refusal.value.hint
    with pytest.raises(BadInput, match=reason):
        make_engine(tiny_backbone(), small_task(), TRAIN, SearchSpec(metric=name), 1)


def test_metrics_import_no_scikit_learn() -> None:
    """The metrics' modules work without scikit-learn, which takes seconds to import."""
    import subprocess

    code = "import sys, orchestrator.tuning.evaluate; print('sklearn' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
