"""The facts on a model card, collected from the registry and free of secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.artifact import IMPORTED, Manifest
from orchestrator.data.outcomes.confidence import interval
from orchestrator.data.tables import table_suffix
from orchestrator.job.metrics import BY_NAME, Metric
from orchestrator.job.spec import BUILTIN, looks_like_path
from orchestrator.models.source import Family, usual_family
from orchestrator.registry import (
    EvaluationRecord,
    Move,
    Registry,
    SeedSpread,
    VersionSummary,
    read_evaluations,
    tagged_metric,
)
from orchestrator.utils.text import hide_secrets

Kind = Literal["builtin", "local", "hub"]


@dataclass(frozen=True)
class Place:
    """The name of a model or of data, as it may be published, and the kind of place it names."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about a version, without secrets and paths of this machine."""

    name: str
    version: int
    adapter: str
    """Where PEFT finds the prompt: a folder's name, or a repository on the hub."""
    manifest: Manifest
    metric: Metric | None = None
    """The metric that its search ranked trials by; None if it is not recorded."""
    seeds: SeedSpread | None = None
    intervals: Mapping[str, tuple[float, float]] | None = None
    """The 95 % intervals of the test metrics over the test rows; None without their outcomes."""
    moves: Sequence[Move] = ()
    """For each alias that the version has, its move there."""
    evaluations: Sequence[EvaluationRecord] = ()
    """Results on other data than the version's own test rows."""
    licence: str = ""
    """The base model's licence; empty if it is not known."""

    @property
    def base(self) -> Place:
        return place_of(self.manifest.base_model.id)

    @property
    def data(self) -> Place:
        return data_place(self.manifest.data.path, self.manifest.data.place)

    @property
    def family(self) -> Family:
        return usual_family(self.manifest.base_model.model_type)

    @property
    def is_imported(self) -> bool:
        return IMPORTED in self.manifest.config

    def lower_is_better(self, metric: str) -> bool:
        """Tell whether low values of a metric are good, as far as that is recorded."""
        known = BY_NAME.get(metric)
        if known is None and self.metric is not None and self.metric.name == metric:
            known = self.metric
        return known is not None and known.better == "min"


def card_facts(
    registry: Registry, summary: VersionSummary, manifest: Manifest, adapter: str, licence: str
) -> CardFacts:
    """Collect the facts about a version. ``adapter`` says where PEFT finds the exported prompt."""
    own = manifest.data.test_fingerprint or manifest.data.fingerprint
    others = [
        record
        for record in read_evaluations(summary)
        if not record.group and not (record.fingerprint == own and manifest.metrics.get("test"))
    ]
    return CardFacts(
        name=hide_secrets(summary.name),
        version=summary.version,
        adapter=adapter,
        manifest=Manifest.model_validate(_without_secrets(manifest.model_dump())),
        metric=tagged_metric(summary.tags),
        seeds=summary.seeds,
        intervals=_intervals(registry, summary, manifest),
        moves=_moves(registry, summary.name, summary.version, summary.aliases),
        evaluations=[_publishable(record) for record in others],
        licence=hide_secrets(licence),
    )


def _without_secrets(value: Any) -> Any:
    """Hide the secrets in all texts of a nested value."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, Mapping):
        return {key: _without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(entry) for entry in value]
    return value


def _intervals(
    registry: Registry, summary: VersionSummary, manifest: Manifest
) -> dict[str, tuple[float, float]] | None:
    outcomes = registry.test_outcomes(summary, manifest.data)
    if outcomes is None:
        return None
    found = {name: interval(outcomes, name) for name in manifest.metrics.get("test", {})}
    return {name: ends for name, ends in found.items() if ends is not None}


def _moves(registry: Registry, name: str, version: int, aliases: Sequence[str]) -> list[Move]:
    """Return the newest recorded move to the version of each alias that it has."""
    newest = {move.alias: move for move in registry.history(name) if move.new == version}
    return [
        replace(newest[alias], reason=hide_secrets(newest[alias].reason))
        for alias in aliases
        if alias in newest
    ]


def _publishable(record: EvaluationRecord) -> EvaluationRecord:
    """Return a record whose data has a name that may be published."""
    name = data_place(record.data, record.data).name
    return replace(record, data=hide_secrets(name), split=hide_secrets(record.split))


def place_of(identifier: str) -> Place:
    """Return what may be published of a model's id: of a folder, only its last name."""
    if identifier.startswith(BUILTIN):
        return Place(identifier, "builtin")
    if is_hub_id(identifier):
        return Place(identifier, "hub")
    return Place(Path(identifier).name or "unnamed", "local")


def data_place(path: str, folder: str) -> Place:
    """Return what may be published of the place of data.

    ``path`` is the path as a manifest records it, and ``folder`` its short form.
    """
    if _is_json(path):
        return Place("local files" if _is_json(folder) else Path(folder).name, "local")
    if path.startswith(BUILTIN) or not table_suffix(Path(path)):
        return place_of(path)
    return Place(Path(path).name, "local")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_hub_id(text: str) -> bool:
    """Tell whether a name can be one of the hub and is no path here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if looks_like_path(text):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not Path(text).exists()
