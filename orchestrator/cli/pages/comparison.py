"""Versions side by side: a comparison of two, domain shift, and the history of aliases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.cli.pages.table import metric_text, table
from orchestrator.job.labels import label_text
from orchestrator.registry import Move, VersionDetail, printable
from orchestrator.utils.documents import JsonObject

LAST_MOVES = 5
MOST_LABELS = 20  # more labels than this make a page too long to read
WORDS = 3


# Histories


def history_lines(moves: Sequence[Move], most: int = LAST_MOVES) -> list[str]:
    """Format the latest moves of all aliases, newest first; empty without any."""
    newest = sorted(moves, key=lambda move: (move.at, move.number), reverse=True)
    lines = [f"  {move.alias}: {printable(move.sentence())}" for move in newest[:most]]
    more = (
        [f"  ... and {len(moves) - most} earlier ones (--json has them all)"]
        if len(moves) > most
        else []
    )
    return ["moves of aliases, the newest first:", *lines, *more] if lines else []


def history_document(moves: Sequence[Move]) -> list[JsonObject]:
    """Return all moves of all aliases, for ``models NAME --json``."""
    return [asdict(move) for move in moves]


# Two versions


def comparison_document(one: VersionDetail, other: VersionDetail) -> JsonObject:
    """Return the document of ``compare --json``; ``differs`` names the facts that are not equal."""
    sides = [_facts(detail) for detail in (one, other)]
    differs = [name for name in sides[0] if sides[0][name] != sides[1].get(name)]
    return {
        "versions": [f"{detail.summary.name}:{detail.summary.version}" for detail in (one, other)],
        "facts": {
            name: [side.get(name) for side in sides]
            for name in dict.fromkeys([*sides[0], *sides[1]])
        },
        "differs": differs,
        "metrics": [detail.summary.metrics for detail in (one, other)],
        "baselines": [detail.summary.baselines for detail in (one, other)],
        "evaluations": [_evaluations(detail) for detail in (one, other)],
        "nearest": [detail.summary.nearest for detail in (one, other)],
        "problems": [detail.problem for detail in (one, other)],
    }


def _facts(detail: VersionDetail) -> JsonObject:
    summary, manifest = detail.summary, detail.manifest
    config = {f"config.{key}": value for key, value in summary.config.items()}
    if manifest is None:
        return config
    base = manifest.base_model
    return {
        "method": manifest.method,
        **config,
        "base model": f"{base.id} ({base.revision})",
        "base model fingerprint": base.fingerprint,
        "template": manifest.template,
        "chat": manifest.chat and manifest.chat.model_dump(),
        "special tokens in text": manifest.special_tokens_in_text,
        "verbalizer": {
            label_text(label): text for label, text in (manifest.verbalizer_map() or {}).items()
        }
        or None,
        "data": manifest.data.path,
        "data fingerprint": manifest.data.fingerprint,
        "steps": manifest.steps,
        "search": manifest.search,
        "aliases": list(summary.aliases),
    }


def _evaluations(detail: VersionDetail) -> dict[str, str]:
    prefix = "evaluated."
    tags = detail.summary.tags
    return {
        key.removeprefix(prefix): text
        for key, text in sorted(tags.items())
        if key.startswith(prefix)
    }


def comparison_page(document: Mapping[str, Any]) -> list[str]:
    """Format what differs, then the metrics, then the nearest words of each virtual token."""
    names = [printable(name) for name in document["versions"]]
    facts, differs = document["facts"], document["differs"]
    rows = [(name, *map(_cell, facts[name])) for name in facts if name in differs]
    same = [name for name in facts if name not in differs]
    lines = table(("what differs", *names), rows) if rows else ["nothing differs"]
    lines += [f"the same in both: {', '.join(same)}"] if same else []
    lines += ["", *table(("metric", *names), _metric_rows(document))]
    if any(document["nearest"]):
        lines += ["", *table(("nearest words of token", *names), _word_rows(document["nearest"]))]
    for name, problem in zip(names, document["problems"], strict=True):
        lines += [f"{name} can't be used: {printable(problem)}"] if problem else []
    return [
        *lines,
        f"next: orchestrator inspect {names[0]}   or   "
        f"orchestrator evaluate {' '.join(names)} --data PATH",
    ]


def _cell(value: Any, most: int = 60) -> str:
    text = (
        ""
        if value is None
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
    return text if len(text) <= most else text[: most - 3] + "..."


def _metric_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    metrics, evaluations = document["metrics"], document["evaluations"]
    rows: list[tuple[str, ...]] = []
    for split in dict.fromkeys(split for side in metrics for split in side):
        rows += _split_rows(split, [side.get(split) for side in metrics])
    for name in dict.fromkeys(name for side in document["baselines"] for name in side):
        rows.append(
            (
                f"{name.replace('_', ' ')}, test",
                *(metric_text(side.get(name)) for side in document["baselines"]),
            )
        )
    for name in dict.fromkeys(name for side in evaluations for name in side):
        rows.append((f"on {name}", *(side.get(name, "") for side in evaluations)))
    return rows


def _split_rows(split: str, sides: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each metric that one of the versions has on a split.

    Values that are no numbers are left out: tags in the registry can be edited.
    """
    found = [side if isinstance(side, dict) else {} for side in sides]
    for name in dict.fromkeys(name for side in found for name in side):
        values = [side.get(name) for side in found]
        yield (
            f"{split} {name}",
            *(_score(value) if isinstance(value, int | float) else "" for value in values),
        )


def _word_rows(nearest: Sequence[Any]) -> list[tuple[str, ...]]:
    longest = max(map(len, nearest))
    return [
        (str(place), *(_words(side[place]) if place < len(side) else "" for side in nearest))
        for place in range(longest)
    ]


def _words(words: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{word!r} {far:.2f}" for word, far in words[:WORDS])


# Domain shift


def shift_page(document: Mapping[str, Any]) -> list[str]:
    """Format each version's metric on its own test split and on every target, with the change.

    If the versions voted, the votes' accuracy, the mean and the best of the versions follow.
    """
    metric, models, targets = document["metric"], document["models"], document["targets"]
    names = [printable(f"{model['name']}:{model['version']}") for model in models]
    votes = any("ensemble" in target for target in targets)
    heading = [metric, "rows", *names, *(["majority", "mean", "best"] if votes else [])]
    own = [model["source"]["metrics"].get(metric) for model in models]
    rows = [["own test split", "", *(_score(value) for value in own), *([""] * 3 if votes else [])]]
    for target in targets:
        cells = [
            f"{_score(found.get(metric))} ({-drop:+.3f})"
            if drop is not None
            else _score(found.get(metric))
            for found, drop in zip(target["metrics"], target["drop"], strict=True)
        ]
        ensemble = target.get("ensemble", {})
        more = [_score(ensemble.get(key)) for key in ("accuracy", "mean", "best")] if votes else []
        rows.append([_target_label(target), target["rows"], *cells, *more])
    legend = "in brackets: the change against the version's own test split" if any(own) else ""
    return [
        *table(heading, rows),
        *([legend] if legend else []),
        *_class_lines(document, names),
        f"next: orchestrator models {names[0]}",
    ]


def _class_lines(document: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Yield a table of each label's figures on the only target.

    Yields nothing for generated texts, for several targets and for many labels; ``--json`` has all
    figures.
    """
    targets = document["targets"]
    if len(targets) != 1:
        return
    for name, classes in zip(names, targets[0]["classes"], strict=True):
        if not classes or len(classes) > MOST_LABELS:
            continue
        rows = [
            (
                label_text(figures["label"]),
                *(_score(figures[key]) for key in ("precision", "recall", "f1")),
                figures["support"],
            )
            for figures in classes
        ]
        yield ""
        yield from table((f"labels of {name}", "precision", "recall", "f1", "rows"), rows)


def _target_label(target: Mapping[str, Any]) -> str:
    return (
        f"  {target['by']} {target['group']}"
        if target["group"] is not None
        else str(target["data"])
    )


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
