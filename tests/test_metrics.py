"""Every metric that a search may rank by is known wherever metrics are compared."""

from __future__ import annotations

from typing import get_args

from orchestrator.cli.workbench.domain_shift import SHOWN_BY
from orchestrator.job.spec import TEXT_METRICS, Metric
from orchestrator.registry.aliases.gate import COMPARED_BY

METRICS = set(get_args(Metric))


def test_the_gate_compares_by_every_metric() -> None:
    """A metric missing from the gate would let champions be compared by another one."""
    assert set(COMPARED_BY) == METRICS


def test_evaluations_show_every_metric() -> None:
    """A metric missing from the table of ``evaluate`` would never be shown."""
    assert set(SHOWN_BY) == METRICS


def test_metrics_of_texts_are_metrics() -> None:
    """Generated texts are compared by metrics that the spec knows."""
    assert METRICS > TEXT_METRICS
