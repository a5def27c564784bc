"""The registry's results as plain values, without mlflow types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.artifact import Manifest
from orchestrator.data.outcomes.confidence import Confidence

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Metrics = dict[str, dict[str, float]]  # split to metric to value

FORMAT_TAG = "orchestrator.format"
"""A version's tag: its artifact format. A version without the tag comes from another program."""
FACTS_TAG = "orchestrator.facts"
"""A version's tag: its manifest's configuration, metrics and baselines as JSON.

A listing therefore downloads nothing.
"""
DIGEST_TAG = "orchestrator.manifest_sha256"
"""A version's tag: the digest of manifest.json, which contains the digest of the weights.

The two stores thus vouch for each other: the tag is in the registry, the files are in the artifact
store.
"""
NEAREST_TAG = "orchestrator.nearest"
"""A version's tag: the nearest words of each virtual token and their distances, as JSON."""
SEEDS_TAG = "orchestrator.seeds"
"""A version's tag: validation metrics over the trials that differ from its own in the seed alone.

JSON with the number of ``trials``, their ``seeds``, mean and standard deviation of each metric in
``validation``, and whether the seeds were ``fresh``: then none of the trials chose the
configuration.
"""
KIND_TAG = "orchestrator.kind"
"""A registered model's tag: the kind of its content, ``KIND`` if this program created it."""
KIND = "soft-prompt"
CHAMPION_TAG = "orchestrator.champion"
"""A registered model's tag: its champion's version and metrics as JSON.

A listing therefore reads no versions.
"""


class SeedSpread(NamedTuple):
    """Validation metrics over trials that differ in the seed alone."""

    seeds: tuple[int, ...]
    mean: dict[str, float]
    std: dict[str, float]
    fresh: bool
    """True if none of the trials chose the configuration."""


class UiCommand(NamedTuple):
    """The command that starts MLflow's UI.

    ``argv`` is executed with ``env`` added to the environment, which keeps a password out of
    ``argv``.
    """

    argv: list[str]
    env: dict[str, str]


class AliasOutcome(NamedTuple):
    """The highest alias that a new version received (None: no alias), and the reason.

    The reason is a sentence.
    """

    alias: str | None
    reason: str
    confidence: Confidence | None = None
    """How sure the difference from the champion is; None if it was not tested."""

    def document(self) -> dict[str, Any]:
        """Return the outcome in JSON's types."""
        tested = {"confidence": self.confidence.document()} if self.confidence else {}
        return {"alias": self.alias, "reason": self.reason, **tested}


class Promotion(NamedTuple):
    """The move of an alias through the gate."""

    before: int | None
    """The version that held the alias; None for a new alias."""
    after: int
    reason: str
    """A clause; empty where nothing was compared."""
    confidence: Confidence | None = None

    def document(self) -> dict[str, Any]:
        """Return the reason and the confidence in JSON's types."""
        tested = {"confidence": self.confidence.document()} if self.confidence else {}
        return {"reason": self.reason, **tested}


@dataclass(frozen=True)
class ModelSummary:
    """One registered model in a listing."""

    name: str
    latest: int | None
    """The newest version's number; None when the model has no versions."""
    aliases: dict[str, int]
    champion_metrics: Metrics | None
    is_prompt: bool
    """False for a model that another program registered in the same store."""


@dataclass(frozen=True)
class VersionSummary:
    """One version of a registered model.

    Its config, metrics and baselines are empty when another program registered it.
    """

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
        """The nearest words of each virtual token; empty if they are not recorded."""
        try:
            return [
                [(str(word), float(far)) for word, far in words]
                for words in json.loads(self.tags[NEAREST_TAG])
            ]
        except (KeyError, ValueError, TypeError):
            return []

    @property
    def seeds(self) -> SeedSpread | None:
        """The spread of its configuration over seeds; None if it is not recorded."""
        try:
            spread = json.loads(self.tags[SEEDS_TAG])
            metrics = spread["validation"]
            return SeedSpread(
                tuple(map(int, spread["seeds"])),
                {name: float(found["mean"]) for name, found in metrics.items()},
                {name: float(found["std"]) for name, found in metrics.items()},
                bool(spread["fresh"]),
            )
        except (KeyError, ValueError, TypeError, AttributeError):  # users can edit tags
            return None


@dataclass(frozen=True)
class VersionDetail:
    """One version in full.

    ``manifest`` is None when the artifact can't be read; ``problem`` then holds the reason.
    """

    summary: VersionSummary
    source: str
    manifest: Manifest | None
    problem: str = ""


def version_summary(entity: ModelVersion, aliases: dict[str, int]) -> VersionSummary:
    """Convert MLflow's entity to our value.

    ``aliases`` are the registered model's, because MLflow's listings omit the aliases of versions.
    """
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
    # Users can edit tags, and a listing must survive that.
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, dict)}
