"""The description of a version on its MLflow page, in markdown.

It shows the version's results, its origin, the words nearest to its tokens, and how to query it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.artifact import Manifest
from orchestrator.registry.versions.records import Metrics, VersionSummary
from orchestrator.registry.versions.refs import printable

MAX_DESCRIPTION = 5000  # the size of MLflow's column
SHOWN_TOKENS = 20
SHOWN_WORDS = 3

Words = Sequence[Sequence[tuple[str, float]]]


def version_description(
    manifest: Manifest, name: str, champion: VersionSummary | None = None, nearest: Words = ()
) -> str:
    """Write a version's description in markdown, within MLflow's length limit.

    ``champion`` is the champion at the time that the version is registered.
    """
    base = manifest.base_model
    config = ", ".join(f"{key} {_code(_plain(value))}" for key, value in manifest.config.items())
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest.data.rows.items())
    rows: dict[str, Metrics] = {"this prompt": manifest.metrics} | manifest.baselines
    if champion is not None:
        rows[f"the champion then, version {champion.version}"] = champion.metrics
    head = [
        f"Soft prompt of {manifest.num_virtual_tokens} virtual tokens ({_code(manifest.method)}), "
        f"{config}.",
        "",
        *metrics_table(rows),
        "",
        f"Base model {_code(base.id)} at {_code(base.revision)}, fingerprint "
        f"{_code(base.fingerprint[:16])}.",
        f"Data {_code(manifest.data.place)} (rows: {counts}), {manifest.steps} steps.",
        f"Template {_code(manifest.template)}. Trial {_code(manifest.trial)} of search "
        f"{_code(manifest.search)}.",
        "",
        f'Ask it: `orchestrator query {name} "text"` (the champion), `name@alias` or '
        "`name:version` for another.",
        f"Without our server: `mlflow models serve -m models:/{name}/VERSION --env-manager local`.",
    ]
    return _within("\n".join([*head, *_nearest(nearest)]))


def metrics_table(rows: Mapping[str, Metrics]) -> list[str]:
    """Build a markdown table: one line per entry of ``rows``, one column per split and metric."""
    columns = list(
        dict.fromkeys(
            (split, metric) for row in rows.values() for split in row for metric in row[split]
        )
    )
    lines = ["| | " + " | ".join(f"{split} {metric}" for split, metric in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for label, row in rows.items():
        values = [row.get(split, {}).get(metric) for split, metric in columns]
        cells = [f"{value:.4g}" if isinstance(value, int | float) else "" for value in values]
        lines.append(f"| {label.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def _plain(value: Any) -> Any:
    """Return a configuration value in readable form.

    An init is shown by its own text or artifact, and a number with four significant digits.
    """
    if isinstance(value, dict) and len(value) == 1:
        return " ".join(map(str, next(iter(value.items()))))
    return f"{value:.4g}" if isinstance(value, float) else value


def _nearest(nearest: Words) -> list[str]:
    if not nearest:
        return []
    rows = [
        f"| {place} | "
        + " ".join(f"{_cell(word)} {distance:.2f}" for word, distance in words[:SHOWN_WORDS])
        + " |"
        for place, words in enumerate(nearest[:SHOWN_TOKENS])
    ]
    more = (
        [f"{len(nearest) - SHOWN_TOKENS} further tokens: `orchestrator inspect`."]
        if len(nearest) > 20
        else []
    )
    return [
        "",
        "Nearest words of the vocabulary, by cosine distance:",
        "",
        "| token | words |",
        "|---|---|",
        *rows,
        *more,
    ]


def _cell(word: str) -> str:
    return _code(f"\u201c{printable(word)}\u201d").replace("|", "\\|")


def _within(text: str) -> str:
    """Cut the text at the end of a line so that it fits into MLflow's column."""
    if len(text) <= MAX_DESCRIPTION:
        return text
    kept = text[: MAX_DESCRIPTION - 5]
    return (kept[: kept.rfind("\n")] if "\n" in kept else kept) + "\n..."


def _code(value: Any) -> str:
    """Format the value as inline code.

    Job specs contain free text, which the page must show and not render.
    """
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"
