"""The metadata of a model card, which the hub reads: YAML in front of the card's text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.cli.workbench.card.facts import CardFacts
from orchestrator.registry import printable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LIBRARY = "peft"
TAGS = ("prompt-orchestrator", "soft-prompt")
CLASSIFICATION, GENERATION = "text-classification", "text-generation"
TASK_NAMES = {CLASSIFICATION: "Text classification", GENERATION: "Text generation"}
METRIC_TYPES: Mapping[str, str] = {
    "macro_f1": "f1",
    "weighted_f1": "f1",
    "mcc": "matthews_correlation",
    "rouge_l": "rouge",
}
"""The hub's names of metrics that it calls otherwise."""


def task_of(facts: CardFacts) -> str:
    """Return the hub's name of the task that the prompt solves."""
    return GENERATION if facts.manifest.verbalizer is None else CLASSIFICATION


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the metadata of a version's card.

    Only models and data of the hub are named, since the hub refuses other names.
    """
    from huggingface_hub import ModelCardData

    base, data = facts.base, facts.data
    results = _eval_results(facts)
    tags = [*TAGS, facts.manifest.method.replace("_", "-")]
    if base.kind == "hub":
        tags.append(f"base_model:adapter:{base.name}")
    return ModelCardData(
        base_model=base.name if base.kind == "hub" else None,
        library_name=LIBRARY,
        pipeline_tag=task_of(facts),
        datasets=[data.name] if data.kind == "hub" else None,
        tags=tags,
        model_name=printable(facts.name) if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the test metrics, and those on other data; each data set and split once."""
    own = facts.manifest.metrics.get("test", {})
    results = _results_on(facts, facts.data.name, "test", own)
    seen = {(facts.data.name, "test")} if results else set()
    for record in facts.evaluations:
        if (record.data, record.split) not in seen:
            seen.add((record.data, record.split))
            results += _results_on(facts, record.data, record.split, record.metrics)
    return results


def _results_on(
    facts: CardFacts, data: str, split: str, metrics: Mapping[str, float]
) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    task = task_of(facts)
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_NAMES[task],
            dataset_type=printable(data),
            dataset_name=printable(data),
            dataset_split=printable(split),
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=name,
            metric_value=float(f"{value:.6g}"),
        )
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
