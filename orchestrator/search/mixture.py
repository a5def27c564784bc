"""The result of a search that mixes methods: the best of each, and which of them is registered.

A search that looks for the best method must not hide that the best one can't be served. If a trial
of a baseline is better than every prompt by the search's metric, the best prompt is registered all
the same, but it does not become champion: a person decides whether the second best goes live.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from orchestrator.job.spec import PROMPT_METHODS, JobSpec
from orchestrator.search.state.trials import Metrics, TrialRecord
from orchestrator.utils.documents import JsonObject

if TYPE_CHECKING:
    from orchestrator.search.result import BestTrial


def is_prompt(trial: TrialRecord, job: JobSpec) -> bool:
    """Tell whether the trial learns a prompt, which can be registered and served."""
    return (trial.spec.method or job.method) in PROMPT_METHODS


def to_test(ranked: Sequence[TrialRecord], job: JobSpec) -> list[TrialRecord]:
    """Return the trials to evaluate on the test split, best first.

    These are the trials to register, and in a mixed search the best trial of each method.
    """
    count = max(1, job.registry.register_top)
    if not job.mixes:
        return list(ranked[:count])
    prompts = [trial for trial in ranked if is_prompt(trial, job)][:count]
    wanted = {trial.id for trial in (*prompts, *best_of_each(ranked).values())}
    return [trial for trial in ranked if trial.id in wanted]


def best_of_each(ranked: Iterable[TrialRecord]) -> dict[str, TrialRecord]:
    """Return the best trial of each method, best first."""
    best: dict[str, TrialRecord] = {}
    for trial in ranked:
        best.setdefault(trial.spec.method, trial)
    return best


def method_documents(
    tested: Sequence[BestTrial], trials: Iterable[TrialRecord], job: JobSpec
) -> list[JsonObject]:
    """Describe the best trial of each method with its costs, as ``run --json`` prints it.

    The methods are in the order of their best trials; those without a result come last.
    """
    counts = dict.fromkeys(job.methods, 0)
    for trial in trials:
        if not trial.spec.confirms:
            counts[trial.spec.method] += 1  # type: ignore[index]
    best: dict[str, BestTrial] = {}
    for each in tested:
        best.setdefault(each.record.spec.method, each)
    return [
        {
            "method": method,
            "trials": counts[method],  # type: ignore[index]
            "registrable": method in PROMPT_METHODS,
            "trial": best[method].record.id if method in best else None,
            "config": best[method].record.spec.config() if method in best else None,
            "metrics": best[method].metrics if method in best else {},
            "costs": asdict(best[method].record.costs) if method in best else None,
        }
        for method in [*best, *(name for name in counts if name not in best)]
    ]


def method_metrics(documents: Iterable[JsonObject]) -> Metrics:
    """Return the figures of each method's best trial as metrics of the search's MLflow run."""
    named: Metrics = {}
    for found in documents:
        method = found["method"]
        for split, metrics in found["metrics"].items():
            named |= {f"best_{method}_{split}_{name}": value for name, value in metrics.items()}
        for name, value in (found["costs"] or {}).items():
            named[f"best_{method}_cost_{name}"] = float(value)
    return named


def better_baseline(best: TrialRecord, prompt: TrialRecord, job: JobSpec) -> str:
    """Say which baseline is better than the best prompt; "" if the prompt is as good.

    After a confirmation the order of the confirmed configurations decides; before, equal values of
    the metric count as equally good, though the loss ranks them.
    """
    if is_prompt(best, job):
        return ""
    method, metric, sign = best.spec.method, job.search.metric, job.search.ranked_by.sign
    value, other = best.metrics[metric], prompt.metrics[metric]
    named = f"the best prompt, {prompt.id} ({prompt.spec.method})"
    if job.search.confirm is not None:
        text = f"trial {best.id} ({method}) comes before {named}, after the confirmation"
    elif sign * value > sign * other:
        figures = f"validation {metric} {value:.3f} against {other:.3f}"
        text = f"trial {best.id} ({method}) is better than {named}, with {figures}"
    else:
        return ""
    return f"{text}; {method} can be neither registered nor served"
