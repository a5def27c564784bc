"""The report's page: tables and figures in one HTML file that needs no other file or network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import yaml

from orchestrator import __version__
from orchestrator.data.outcomes.label_metrics import CLASS_FIGURES, labelled_figures
from orchestrator.job.spec import PROMPT_METHODS
from orchestrator.search.report.facts import SearchFacts, init_label
from orchestrator.search.report.figures import FIGURES, MIXED_FIGURES
from orchestrator.search.state.confirmation import confirmed
from orchestrator.search.state.trials import TrialRecord
from orchestrator.utils.wording import BASELINE_NAMES, counted

MOST_TRIALS = 200
TITLES = {name: title for name, (title, _) in (FIGURES | MIXED_FIGURES).items()}
STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0 auto;padding:1rem;\
max-width:76rem}
h1{font-size:1.4rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
p{margin:.3rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #ddd;vertical-align:top}
td.n{text-align:right}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;border:1px solid #ddd;border-radius:6px;padding:.5rem}
figure img{width:100%;height:auto;display:block}
figcaption{font-weight:600;margin-bottom:.3rem}
pre{background:#f6f6f6;padding:.6rem;overflow-x:auto;font-size:.85rem}
.best td{font-weight:600}
"""


def page(facts: SearchFacts, figures: Mapping[str, bytes]) -> str:
    """Write the whole page, in which all text of the job and its data is escaped."""
    body = [
        f"<h1>Search {escape(facts.id)}</h1>",
        f"<p>{escape(_sentence(facts))}</p>",
        "<h2>Result</h2>",
        table_of(["", *_metric_names(facts)], _results(facts)),
        *_model(facts),
        *_methods(facts),
        *_confirmed(facts),
        *_classes(facts),
        *_warnings(facts),
        "<h2>Pictures</h2>",
        '<div class="figures">'
        + "".join(_figure(name, figures[name]) for name in TITLES if name in figures)
        + "</div>",
        "<h2>Trials</h2>",
        _trials(facts),
        "<h2>Job</h2>",
        f"<pre>{escape(_job(facts))}</pre>",
        f"<p>MLflow run {escape(facts.run_id)}. "
        f"Made by prompt-orchestrator {escape(__version__)}.</p>",
    ]
    return document_of(facts.id, body)


def document_of(title: str, body: Sequence[str]) -> str:
    """Make an HTML document of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _job(facts: SearchFacts) -> str:
    document = facts.job.model_dump(mode="json", exclude_none=True)
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _sentence(facts: SearchFacts) -> str:
    job, result = facts.job, facts.result
    ended = [trial.status for trial in facts.trials]
    counts = ", ".join(f"{ended.count(status)} {status}" for status in sorted(set(ended)))
    trials = counted(len(facts.trials), "trial")
    state = f"took {result['seconds']['total']:.0f} s" if result else "is not finished"
    return (
        f"{', '.join(job.methods)} of {job.base_model.id} ({job.base_model.revision}). "
        f"{trials}: {counts}. "
        f"Searcher {job.search.searcher}, scheduler {job.search.scheduler}, "
        f"ranked by validation {facts.metric}. "
        f"The search {state}."
    )


def _metric_names(facts: SearchFacts) -> list[str]:
    return [f"{split} {name}" for split, name in _columns(facts)]


def _columns(facts: SearchFacts) -> list[tuple[str, str]]:
    validated = facts.scored[0].metrics if facts.scored else {}
    tested = (facts.result or {}).get("best", {}).get("metrics", {}).get("test", {})
    named = dict.fromkeys([facts.metric, *validated])
    more = [("test", name) for name in tested if name not in named]
    return [(split, name) for name in named for split in ("validation", "test")] + more


def _results(facts: SearchFacts) -> list[list[Any]]:
    lines: dict[str, Any] = {
        BASELINE_NAMES.get(name, name): found for name, found in facts.baselines.items()
    }
    if facts.result:
        best = facts.result["best"]
        lines[facts.job.result_name(best.get("config", {}).get("method", ""))] = best["metrics"]
    elif facts.winner:
        lines["best so far"] = {"validation": facts.winner.metrics}
    return [
        [name, *(_number(found.get(split, {}).get(metric)) for split, metric in _columns(facts))]
        for name, found in lines.items()
    ]


def _model(facts: SearchFacts) -> list[str]:
    lines = []
    if winner := facts.winner:
        lines.append(f"<p>Best trial {escape(winner.id)}: {escape(winner.spec.label())}.</p>")
    if facts.result and (model := facts.result.get("model")):
        alias = f", alias {model['alias']}" if model.get("alias") else ""
        lines.append(
            f"<p>Registered as {escape(model['name'])} "
            f"version {model['version']}{escape(alias)}.</p>"
        )
        if reason := model.get("reason"):
            lines.append(f"<p>{escape(reason)}</p>")
    return lines


def _methods(facts: SearchFacts) -> list[str]:
    """Return the section of the best trial of each method with its costs, in a mixed search."""
    documents = {each["method"]: each for each in (facts.result or {}).get("methods", ())}
    rows = []
    for method, trial in facts.best_of_each.items():
        tested = documents.get(method, {}).get("metrics", {}).get("test", {})
        costs = trial.costs
        rows.append([
            method, trial.id, _number(trial.metrics.get(facts.metric)),
            _number(tested.get(facts.metric)), f"{costs.parameters:,}", f"{costs.stored_bytes:,}",
            f"{costs.seconds:.1f}", f"{costs.evaluation_seconds:.2f}",
            f"{costs.peak_bytes / 1e6:.0f}", "yes" if method in PROMPT_METHODS else "no",
            replace(trial.spec, method="").label(),
        ])  # fmt: skip
    heading = [
        "method", "trial", f"validation {facts.metric}", f"test {facts.metric}",
        "trained parameters", "stored bytes", "training s", "evaluation s", "peak MB",
        "can be registered", "configuration",
    ]  # fmt: skip
    title = f"<h2>Best of each method, by validation {escape(facts.metric)}</h2>"
    return [title, table_of(heading, rows, best=True)] if rows else []


def _confirmed(facts: SearchFacts) -> list[str]:
    """Return the section of configurations trained again, best first, if there are any."""
    metric, search = facts.metric, facts.job.search
    found = [one.document(search) for one in confirmed(facts.trials, search)]
    rows = [
        [
            one["trial"], _number(one["first_run"].get(metric)), _number(one["mean"].get(metric)),
            _number(one["std"].get(metric)), len(one["runs"]) - one["failed"], one["failed"],
            one["best_run"] or "",
        ]
        for one in found
    ]  # fmt: skip
    heading = ["configuration of", "first run", "mean", "std", "seeds", "failed", "best run"]
    title = f"<h2>Confirmed under fresh seeds, by mean validation {escape(metric)}</h2>"
    return [title, table_of(heading, rows, best=True)] if rows else []


def _classes(facts: SearchFacts) -> list[str]:
    """Return the winner's figures for each label on the test rows, if the rows have labels."""
    confusion = (facts.result or {}).get("best", {}).get("confusion")
    if not confusion:
        return []
    classes = labelled_figures(confusion["labels"], confusion["counts"])
    rows = [
        [figures["label"], *(_number(figures[name]) for name in CLASS_FIGURES)]
        for figures in classes
    ]
    return ["<h2>Labels of the test rows</h2>", table_of(["label", *CLASS_FIGURES], rows)]


def _warnings(facts: SearchFacts) -> list[str]:
    """Return the section of warnings, or nothing if there are none."""
    if not facts.warnings:
        return []
    items = "".join(f"<li>{escape(warning)}</li>" for warning in facts.warnings)
    return ["<h2>Warnings</h2>", f"<ul>{items}</ul>"]


def _figure(name: str, svg: bytes) -> str:
    title = escape(TITLES[name])
    data = base64.b64encode(svg).decode()
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _winner_first(facts: SearchFacts) -> list[TrialRecord]:
    """Return the trials in the order of the table: the result's, then the others, best first."""
    winner = facts.winner
    first = [] if winner is None else [winner]
    scored = [trial for trial in facts.scored if trial is not winner]
    return [*first, *scored, *(trial for trial in facts.trials if trial not in facts.scored)]


def _trials(facts: SearchFacts) -> str:
    ordered = _winner_first(facts)
    rows = [
        [
            trial.id, *([trial.spec.method] if facts.job.mixes else []), trial.status,
            init_label(trial.spec), trial.spec.size or "",
            f"{trial.spec.learning_rate:.3g}", trial.spec.seed,
            trial.step, _number(trial.metrics.get(facts.metric)),
            _number(trial.metrics.get("loss")), f"{trial.costs.parameters:,}",
            f"{trial.costs.seconds:.1f}",
        ]
        for trial in ordered[:MOST_TRIALS]
    ]  # fmt: skip
    heading = [
        "trial",
        *(["method"] if facts.job.mixes else []),
        "status",
        "init",
        facts.size_name,
        "learning rate",
        "seed",
        "steps",
        f"validation {facts.metric}",
        "loss",
        "trained parameters",
        "training s",
    ]
    more = (
        f"<p>and {len(ordered) - MOST_TRIALS} more, in MLflow</p>"
        if len(ordered) > MOST_TRIALS
        else ""
    )
    return table_of(heading, rows, best=bool(facts.scored)) + more


def table_of(heading: Sequence[str], rows: Sequence[Sequence[Any]], best: bool = False) -> str:
    """Write an HTML table; ``best`` highlights its first row."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heading)
    lines = [
        f"<tr{' class=best' if best and not number else ''}>" + "".join(map(_cell, row)) + "</tr>"
        for number, row in enumerate(rows)
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    text = escape(str(value))
    return (
        f'<td class="n">{text}</td>'
        if isinstance(value, int | float) or _is_number(text)
        else f"<td>{text}</td>"
    )


def _is_number(text: str) -> bool:
    return bool(text) and text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
