"""The summary of a finished search, and a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from orchestrator.cli.pages.table import aligned, table
from orchestrator.cli.progress import duration
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.confirmation import confirmed_text
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.wording import BASELINE_NAMES, counted

if TYPE_CHECKING:
    from orchestrator.search.plan.plan import Plan

# Searches


def run_summary(document: JsonObject, spec: JobSpec) -> list[str]:
    """Format a finished search: its best trial beside the baselines, and the next step."""
    best, metric = document["best"], spec.search.metric
    rows = [
        (BASELINE_NAMES[name], f"{found['validation'][metric]:.3f}", f"{found['test'][metric]:.3f}")
        for name, found in document["baselines"].items()
    ]
    tuned = best["metrics"]
    name = spec.result_name(best["config"].get("method", ""))
    rows.append((name, f"{tuned['validation'][metric]:.3f}", f"{tuned['test'][metric]:.3f}"))
    seconds = document["seconds"]
    lines = [
        f"search {document['search']}: {counted(len(document['trials']), 'trial')} in "
        f"{duration(seconds['training'])}, {duration(seconds['total'])} in all",
        f"best trial {best['trial']}: {TrialSpec.from_config(best['config']).label()}",
        *([confirmed_text(found, metric)] if (found := document.get("confirmed")) else []),
        "",
        *table((metric, "validation", "test"), rows),
        "",
        *_methods(document.get("methods", ()), metric),
        *(f"warning: {text}" for text in document.get("warnings", [])),
    ]
    if kept := document.get("artifact"):
        text = (
            f"kept in {kept} and with the search's run; "
            "a baseline is no prompt, and is neither registered nor served"
        )
        if model := document["model"]:  # a search of several methods, whose best is a baseline
            return [*lines, text, model["reason"], *_registered(model)]
        return [
            *lines,
            text,
            f"next: orchestrator report {document['search']} OTHER...   (beside other searches)",
        ]
    return [*lines, *_registered(document["model"])]


def _methods(methods: Iterable[JsonObject], metric: str) -> list[str]:
    """Format the best trial of each method with its costs; nothing for a search of one method."""
    rows = [
        (
            found["method"], found["trial"] or "no result", str(found["trials"]),
            *(f"{found['metrics'][split][metric]:.3f}" if found["metrics"] else ""
              for split in ("validation", "test")),
            *_costs(found["costs"]),
        )
        for found in methods
    ]  # fmt: skip
    heading = (
        "method", "best trial", "trials", "validation", "test", "trained", "stored bytes",
        "training s", "peak MB",
    )  # fmt: skip
    return [*table(heading, rows), ""] if rows else []


def _costs(costs: Mapping[str, float] | None) -> tuple[str, str, str, str]:
    if costs is None:
        return "", "", "", ""
    return (
        f"{costs['parameters']:,}",
        f"{costs['stored_bytes']:,}",
        f"{costs['seconds']:.1f}",
        f"{costs['peak_bytes'] / 1e6:.0f}",
    )


def _registered(model: JsonObject | None) -> list[str]:
    if model is None:
        return ["nothing was registered (registry.register_top is 0)"]
    alias = f", alias {model['alias']}" if model["alias"] else ""
    steps = [f"orchestrator serve {model['name']}", "orchestrator ui"]
    if model["alias"] != "champion":
        steps.insert(0, f"orchestrator promote {model['name']} {model['version']}")
    return [
        f"registered {model['name']} version {model['version']}{alias}",
        f"next: {'   or   '.join(steps)}",
    ]


# Plans


def plan_page(plan: Plan, spec: JobSpec) -> list[str]:
    """Format what a search will take, with warnings such as about what does not fit."""
    placement, measured, found = plan.placement, plan.measured, plan.forecast
    pace, packed = measured.pace, f"{counted(placement.trials_per_worker, 'trial')} packed"
    reached = ", ".join(
        f"{step} steps: {_number(trials)}"
        for step, trials in zip(found.rungs, found.reached, strict=True)
    )
    low, high = found.spread
    spread = f" ({duration(low)} to {duration(high)})" if round(high) > round(low) else ""
    facts = [
        ("trials", f"{plan.trials}; expected to reach {reached} ({spec.search.scheduler})"),
        *_confirmation(plan),
        ("steps", f"about {plan.steps:.0f} of at most {plan.most_steps}"),
        (
            "slots",
            f"{placement.slots}: {counted(placement.workers, 'worker')} of "
            f"{counted(placement.trials_per_worker, 'slot')}"
            f", {counted(placement.threads, 'thread')} each, on {measured.device}",
        ),
        (
            "memory",
            f"about {_gigabytes(measured.usual)} a worker, "
            f"{_gigabytes(measured.peak)} with the longest rows and "
            f"prompts alone: {_gigabytes(measured.idle)} with the base model loaded "
            f"(its weights {_gigabytes(measured.weights)}) and {_gigabytes(plan.slot)} a slot; "
            f"there is {_gigabytes(measured.room)}",
        ),
        (
            "step",
            f"{_milliseconds(pace.step_packed)} of {packed}, "
            f"{_milliseconds(pace.step_alone)} alone",
        ),
        (
            "evaluation",
            f"{_milliseconds(pace.evaluation_packed)} of {packed}, "
            f"{_milliseconds(pace.evaluation_alone)} alone",
        ),
        (
            "search",
            f"about {duration(plan.seconds['search'])}{spread}, "
            f"{plan.device_hours:.3g} device hours in all",
        ),
        ("in all", f"about {duration(plan.seconds['total'])}: " + _parts(plan.seconds)),
    ]
    return [
        *aligned(facts),
        *(f"warning: {text}" for text in (*plan.data_warnings, *plan.warnings)),
    ]


def _confirmation(plan: Plan) -> list[tuple[str, str]]:
    if plan.confirmation is None:
        return []
    steps = f"about {plan.confirmation.steps:.0f} steps"
    return [("confirmation", f"at most {counted(plan.confirming, 'trial')} more, {steps}")]


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {duration(value)}" for name, value in seconds.items() if name != "total"
    )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
