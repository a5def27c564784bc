"""Metrics in the gate: direction, range, and champions that differ by metric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.artifact import Manifest, read_manifest
from orchestrator.job.metrics import METRICS, Metric
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec
from orchestrator.registry.aliases.gate import (
    BETTER_TAG,
    METRIC_TAG,
    ComparedVersion,
    comparison_metric,
    verdict,
)
from orchestrator.search.state.trials import TrialRecord, ranked
from orchestrator.tuning.evaluate import Ranked, RankedRows, Wanted

# 100 rows, ten of them of the rare second label.
TRUE = [0] * 90 + [1] * 10
ALWAYS_FIRST = [0] * 100
FINDS_THE_RARE = [0] * 78 + [1] * 12 + [1] * 9 + [0]


def metrics_of(said: list[int]) -> dict[str, float]:
    """Compute the metrics of answers as an evaluation does."""
    tally = Ranked.nothing(2)
    scores = np.log(np.array([[0.9, 0.1] if label == 0 else [0.2, 0.8] for label in said]))
    tally.add(range(100), TRUE, RankedRows(said, scores), keeps=True)
    return tally.metrics(TRUE, Wanted(everything=True))


METRICS_OF = {
    "always first": metrics_of(ALWAYS_FIRST),
    "finds the rare": metrics_of(FINDS_THE_RARE),
}


def test_accuracy_and_macro_f1_pick_different_champions(
    make_artifact: Callable[..., Path],
) -> None:
    """On imbalanced labels, accuracy prefers a prompt that never finds the rare label.

    Of 100 rows with 10 rare ones, one prompt answers the frequent label always (accuracy 0.90,
    macro F1 0.47). Another finds 9 of the rare rows (accuracy 0.87, macro F1 0.75). The search's
    ranking and the gate both choose the first by accuracy, and the second by macro F1.
    """
    spec = TrialSpec("random", None, 5, 0.1, 0)
    trials = [TrialRecord(name, spec, metrics=metrics) for name, metrics in METRICS_OF.items()]
    versions = {
        name: ComparedVersion(read_manifest(make_artifact(metrics={"test": metrics})), {})
        for name, metrics in METRICS_OF.items()
    }
    chosen = {}
    for metric in ("accuracy", "macro_f1"):
        search = SearchSpec(metric=metric)
        first, second = (trial.id for trial in ranked(trials, search))
        assert verdict(versions[first], versions[second], metric, search.better)[0]
        assert not verdict(versions[second], versions[first], metric, search.better)[0]
        chosen[metric] = first
    assert chosen == {"accuracy": "always first", "macro_f1": "finds the rare"}
    figures = [
        [round(metrics[name], 2) for name in ("accuracy", "macro_f1", "mcc")]
        for metrics in METRICS_OF.values()
    ]
    assert figures == [[0.9, 0.47, 0.0], [0.87, 0.75, 0.56]]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_gate_compares_by_every_metric(
    make_artifact: Callable[..., Path], metric: Metric
) -> None:
    """The metric of a version's search decides, in the metric's own direction."""

    def version(value: float) -> ComparedVersion:
        found = {"accuracy": 0.5, "loss": 0.5, metric.name: value}
        return ComparedVersion(_labelled(make_artifact, found), {METRIC_TAG: metric.name})

    low, high = version(0.25), version(0.75)
    name, better = comparison_metric(low, high)
    assert (name, better) == (metric.name, metric.better)
    assert verdict(low, high, name, better)[0] == (better == "min")
    assert verdict(high, low, name, better)[0] == (better == "max")


def _labelled(make_artifact: Callable[..., Path], test: dict[str, float]) -> Manifest:
    return read_manifest(make_artifact(metrics={"test": test}))


@pytest.mark.parametrize("better", ["min", "max"])
def test_the_gate_compares_by_a_function_in_its_direction(
    make_artifact: Callable[..., Path], better: str
) -> None:
    """A version's tags name the function and its direction; the gate does not import it."""
    name = "no_module_of_this_name:cost"
    tags = {METRIC_TAG: name, BETTER_TAG: better}
    low, high = (
        ComparedVersion(_labelled(make_artifact, {name: it}), tags) for it in (-7.0, 300.0)
    )
    assert comparison_metric(low, high) == (name, better)
    assert verdict(low, high, *comparison_metric(low, high))[0] == (better == "min")
    assert verdict(high, low, *comparison_metric(high, low))[0] == (better == "max")


def test_a_champion_without_the_metric_is_named(make_artifact: Callable[..., Path]) -> None:
    """A champion of an earlier release has no macro F1: the gate says so, and does not guess."""
    new = _labelled(make_artifact, {"accuracy": 0.9, "macro_f1": 0.7})
    old = _labelled(make_artifact, {"accuracy": 0.8})
    found = verdict(ComparedVersion(new, {}), ComparedVersion(old, {}), "macro_f1", "max")
    assert (found.won, found.reason) == (False, "the champion has no test macro_f1")
