"""A comparison of several searches: metrics against parameters, storage, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from orchestrator import __version__
from orchestrator.job.metrics import metric_named
from orchestrator.search.report.facts import SearchFacts
from orchestrator.search.report.page import document_of, table_of
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.wording import BASELINE_NAMES

HEADING = (
    "method", "search", "trials", "validation", "test", "seeds", "trained parameters",
    "stored bytes", "training s", "evaluation s", "peak MB",
)  # fmt: skip
NOT_THE_SAME = "not the same {}: {}; the lines can't be compared as they stand"


def comparison(facts: Sequence[SearchFacts]) -> JsonObject:
    """Collect the best trial of each search and the common baselines, as ``report --json`` prints.

    ``warnings`` names the differences that make the searches incomparable: data, base model,
    metric.
    """
    found = [_entry(one) for one in facts]
    return {"searches": found, "baselines": _bare(facts), "warnings": _warnings(facts)}


def _entry(facts: SearchFacts) -> JsonObject:
    best, result = facts.winner, facts.result or {}
    reached = result.get("best", {}).get("metrics") or (
        {"validation": best.metrics} if best else {}
    )
    return {
        "search": facts.id,
        "method": (best.spec.method if best else "") or ", ".join(facts.job.methods),
        "base_model": facts.job.base_model.id,
        "trials": len(facts.trials),
        "metric": facts.metric,
        "better": facts.job.search.better,
        "config": best.spec.config() if best else None,
        "metrics": reached,
        **({"seeds": seeds} if (seeds := result.get("best", {}).get("seeds")) else {}),
        "costs": asdict(best.costs) if best else None,
    }


def _bare(facts: Sequence[SearchFacts]) -> JsonObject:
    """Return the baselines of the first search if data, base model and metric are the same for all.

    The written instruction is left out, since it depends on a search's own init texts.
    """
    if _warnings(facts) or not facts:
        return {}
    return {name: found for name, found in facts[0].baselines.items() if name != "instruction"}


def _warnings(facts: Sequence[SearchFacts]) -> list[str]:
    """Name each of data, base model and metric that differs between the searches."""
    parts = {
        "data": [one.data_fingerprint[:12] for one in facts],
        "base model": [one.job.base_model.id for one in facts],
        "metric": [one.metric for one in facts],
    }
    return [
        NOT_THE_SAME.format(name, ", ".join(dict.fromkeys(values)))
        for name, values in parts.items()
        if len(set(values)) > 1
    ]


def comparison_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return a table row for each search, the best by validation first, below the baselines."""
    entries, metric = document["searches"], document["searches"][0]["metric"]
    ranked_by = metric_named(metric, entries[0]["better"])
    ordered = sorted(
        entries,
        key=lambda it: it["metrics"].get("validation", {}).get(metric, ranked_by.worst),
        reverse=ranked_by.better == "max",
    )
    bare = [
        [BASELINE_NAMES[name], "", "",
         *(_number(found.get(split, {}).get(metric)) for split in ("validation", "test")),
         "", "0", "", "", "", ""]
        for name, found in document["baselines"].items()
    ]  # fmt: skip
    return [*bare, *map(_row, ordered)]


def _row(entry: Mapping[str, Any]) -> list[str]:
    metric, costs = entry["metric"], entry["costs"] or {}
    spread = entry.get("seeds", {}).get("validation", {}).get(metric)
    seeds = (
        f"{spread['mean']:.3f} ± {spread['std']:.3f} ({entry['seeds']['trials']})" if spread else ""
    )
    return [
        entry["method"].replace("_", " "),
        entry["search"],
        str(entry["trials"]),
        *(_number(entry["metrics"].get(split, {}).get(metric)) for split in ("validation", "test")),
        seeds,
        f"{costs.get('parameters', 0):,}",
        f"{costs.get('stored_bytes', 0):,}",
        f"{costs.get('seconds', 0.0):.1f}",
        f"{costs.get('evaluation_seconds', 0.0):.2f}",
        f"{costs.get('peak_bytes', 0) / 1e6:.0f}",
    ]


def comparison_page(document: Mapping[str, Any]) -> str:
    """Write the comparison as one HTML page, in which all text of jobs is escaped."""
    metric = document["searches"][0]["metric"]
    body = [
        "<h1>Methods compared</h1>",
        f"<p>The best trial of each search by validation {escape(metric)}. "
        "Seconds of training and of one evaluation "
        "of the validation rows; the peak is what the worker held, frozen model included.</p>",
        *(f"<p>{escape(text)}</p>" for text in document["warnings"]),
        table_of(HEADING, comparison_rows(document)),
        f"<p>Made by prompt-orchestrator {escape(__version__)}.</p>",
    ]
    return document_of("Methods compared", body)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
