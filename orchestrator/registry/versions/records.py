"""What the registry answers: plain values, no mlflow types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.artifact import Manifest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Metrics = dict[str, dict[str, float]]  # split to metric to value

FORMAT_TAG = "orchestrator.format"
"""On a version: the artifact format that it holds. Its absence marks a version that another program registered."""
FACTS_TAG = "orchestrator.facts"
"""On a version: configuration, metrics and baselines of the manifest as JSON, so that a listing downloads nothing."""
DIGEST_TAG = "orchestrator.manifest_sha256"
"""On a version: digest of manifest.json, which holds the weights' own; the two stores vouch for each other."""
NEAREST_TAG = "orchestrator.nearest"
"""On a version: the nearest words of each virtual token and their distances as JSON."""
KIND_TAG = "orchestrator.kind"
"""On a registered model: what it holds; ``KIND`` when it was made here."""
KIND = "soft-prompt"
CHAMPION_TAG = "orchestrator.champion"
"""On a registered model: its champion's version and metrics as JSON, so that a listing reads no versions."""


class UiCommand(NamedTuple):
    """How to start MLflow's UI: ``argv`` to execute, ``env`` to add to the environment (a password stays off argv)."""

    argv: list[str]
    env: dict[str, str]


class AliasOutcome(NamedTuple):
    """The highest alias that a new version ended up with (None: none), and why, in one sentence."""

    alias: str | None
    reason: str


@dataclass(frozen=True)
class ModelSummary:
    """One registered model in a listing."""

    name: str
    latest: int | None
    """The newest version's number; None when there is none."""
    aliases: dict[str, int]
    champion_metrics: Metrics | None
    is_prompt: bool
    """False for a model that another program registered in the same store."""


@dataclass(frozen=True)
class VersionSummary:
    """One version of a registered model; config, metrics and baselines are empty when another program made it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created_at: datetime
    status: str
    run_id: str | None
    description: str
    tags: dict[str, str]
    config: dict[str, Any]
    metrics: Metrics
    baselines: dict[str, Metrics]

    @property
    def is_prompt(self) -> bool:
        return FORMAT_TAG in self.tags

    @property
    def nearest(self) -> list[list[tuple[str, float]]]:
        """The nearest words of each virtual token, as far as they were looked up."""
        try:
            return [
                [(str(word), float(far)) for word, far in words]
                for words in json.loads(self.tags[NEAREST_TAG])
            ]
        except (KeyError, ValueError, TypeError):
            return []


@dataclass(frozen=True)
class VersionDetail:
    """One version in full; ``manifest`` is None when the artifact can't be read, ``problem`` then says why."""

    summary: VersionSummary
    source: str
    manifest: Manifest | None
    problem: str = ""


def version_summary(entity: ModelVersion, aliases: dict[str, int]) -> VersionSummary:
    """MLflow's entity as our value; ``aliases`` are the model's, because listings leave them out of versions."""
    number = int(entity.version)
    tags = {str(key): str(value) for key, value in (entity.tags or {}).items()}
    facts = _facts(tags.get(FACTS_TAG, "{}"))
    return VersionSummary(
        name=entity.name,
        version=number,
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == number)),
        created_at=datetime.fromtimestamp((entity.creation_timestamp or 0) / 1000, UTC),
        status=str(entity.status),
        run_id=entity.run_id or None,
        description=entity.description or "",
        tags=tags,
        config=facts.get("config", {}),
        metrics=facts.get("metrics", {}),
        baselines=facts.get("baselines", {}),
    )


def _facts(text: str) -> dict[str, dict[str, Any]]:
    # Anybody may edit a tag; a listing must survive it.
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, dict)}
