"""Tags of a search's runs, by which people filter and compare runs in MLflow months later."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.cluster.submit import LABELS
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.registry.versions.description import metrics_table
from orchestrator.registry.versions.records import Metrics
from orchestrator.search.prepare import EVALUATED as SPLITS
from orchestrator.search.prepare import Prepared

GIT_SECONDS = 5.0
COMPARED = ("seconds", "device_hours", "trained_steps")  # the figures that a plan estimates


def search_tags(prepared: Prepared, search: str) -> dict[str, Any]:
    """Return the tags that a search's run and its trials' runs share.

    They identify the method, base model, data and code.
    """
    job = prepared.job
    tags = {
        "method": ", ".join(job.methods),
        "base_model": job.base_model.id,
        "base_model_revision": job.base_model.revision,
        "data_fingerprint": prepared.rows.fingerprint,
        "orchestrator.search": search,
        "orchestrator.version": __version__,
        "orchestrator.data_fingerprint": prepared.rows.fingerprint,
    }
    return (
        tags
        | label_tags()
        | ({"mlflow.source.git.commit": commit} if (commit := code_commit()) else {})
    )


def label_tags() -> dict[str, str]:
    """Return the labels that a submitted job was given, as tags; none outside such a job.

    Labels say who submitted the search and for what, so that its costs can be attributed.
    """
    try:
        given = json.loads(os.environ.get(LABELS, "{}"))
    except ValueError:  # not set by `submit`, and no reason to fail a search
        return {}
    return (
        {f"orchestrator.label.{name}": str(value) for name, value in given.items()}
        if isinstance(given, dict)
        else {}
    )


def outcome_tags(took: Mapping[str, float], planned: Mapping[str, float]) -> dict[str, str]:
    """Return the device hours as a tag, and the plan's figures against the outcome's, if any."""
    tags = {"device_hours": f"{took['device_hours']:.4g}"}
    pairs = [(name, planned.get(f"plan_{name}"), took.get(name)) for name in COMPARED]
    texts = [
        f"{name} {before:.4g} planned, {now:.4g} taken"
        for name, before, now in pairs
        if before and now
    ]
    return tags | ({"plan_against_outcome": "; ".join(texts)} if texts else {})


def search_note(
    job: JobSpec,
    best: TrialSpec,
    tuned: Metrics,
    baselines: Mapping[str, Metrics],
    warnings: Sequence[str] = (),
    confirmed: str = "",
    methods: Mapping[str, Metrics] = {},
) -> dict[str, str]:
    """Write the markdown description that MLflow shows on the page of the search's run."""
    rows = {job.result_name(best.method): tuned, **methods}
    rows |= {name: {split: found[split] for split in SPLITS} for name, found in baselines.items()}
    words = " ".join(best.label().replace("`", "'").split())
    lines = [f"Best by validation {job.search.metric}: `{words}`.", "", *metrics_table(rows), ""]
    if confirmed:
        lines += [f"{confirmed[0].upper()}{confirmed[1:]}.", ""]
    for warning in warnings:
        shown = " ".join(warning.replace("`", "'").split())
        lines += [f"Warning: `{shown}`", ""]
    return {
        "mlflow.note.content": "\n".join(
            [*lines, "Pictures and tables: the artifact `report.html`."]
        )
    }


@lru_cache
def code_commit() -> str:
    """Return the commit of this code, with a plus sign if tracked files were changed.

    Returns "" if the code does not run from a checkout, or git fails.
    """
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + (
            "+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=GIT_SECONDS
    ).stdout.strip()
