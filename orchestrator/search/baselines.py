"""The baselines of a search: the untuned model, alone and with what people would write for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from orchestrator.search.context import StartedSearch
from orchestrator.search.tracking import BASE_MODEL, BASELINE_RESULTS, SPLITS
from orchestrator.tuning.reports import EvaluationJob

NOTED_AS = {
    "zero_shot": "without a prompt",
    "few_shot": "with a few examples",
    "instruction": "with the written instruction",
}


@dataclass(frozen=True)
class Baselines:
    """The metrics of each baseline by split, and the moment when a worker had loaded the model."""

    metrics: dict[str, dict[str, Any]]
    loaded_at: float
    """On the clock of ``time.monotonic``."""


def baselines_beside(search: StartedSearch) -> AbstractContextManager[Future[Baselines]]:
    """Evaluate the baselines in a thread beside the block.

    Tune starts the trials' actors while the worker loads the model. Once the model is loaded, the
    baselines are evaluated before the first round of training.
    """
    return search.workers.beside(evaluate_baselines, search)


def evaluate_baselines(search: StartedSearch) -> Baselines:
    """Evaluate the untuned model: bare, with few-shot examples, and with written instructions.

    A resumed search uses the baselines that it recorded.
    """
    context, workers, recorder = search.context, search.workers, search.recorder
    model = workers.ready()
    loaded_at = time.monotonic()
    if slow := workers.slow():
        context.progress.note(f"warning: {slow}")
    if context.history.found(BASE_MODEL) is None:
        recorder.found(BASE_MODEL, model.fingerprint)
    if known := context.history.found(BASELINE_RESULTS):
        return Baselines(known.value, loaded_at)
    baselines = _named(search, _evaluate_texts(search))
    recorder.found(BASELINE_RESULTS, baselines)
    metric = context.job.search.metric
    for name, baseline in baselines.items():
        value = baseline["validation"][metric]
        context.progress.note(f"{NOTED_AS[name]}: validation {metric} {value:.3f}")
    return Baselines(baselines, loaded_at)


def _evaluate_texts(search: StartedSearch) -> dict[str | None, dict[str, Any]]:
    """Return the metrics by split of the model behind each text; None stands for no text."""
    prepared = search.context.prepared
    examples_text, examples = prepared.few_shot
    texts: Sequence[str | None] = [
        None,
        *prepared.instructions,
        *([examples_text] if examples else []),
    ]
    jobs = [EvaluationJob(split, instruction=text) for text in texts for split in SPLITS]
    metrics = iter(search.workers.evaluate(jobs))
    return {text: {split: next(metrics) for split in SPLITS} for text in texts}


def _named(
    search: StartedSearch, by_text: dict[str | None, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Name the baselines. Of the written instructions, the best by validation is kept."""
    examples_text, examples = search.context.prepared.few_shot
    settings = search.context.job.search
    baselines: dict[str, dict[str, Any]] = {"zero_shot": by_text.pop(None)}
    if examples:
        baselines["few_shot"] = {"examples": examples, **by_text.pop(examples_text)}
    if by_text:
        sign = 1.0 if settings.better == "max" else -1.0
        best = max(by_text, key=lambda text: sign * by_text[text]["validation"][settings.metric])
        baselines["instruction"] = {"text": best, **by_text[best]}
    return baselines
