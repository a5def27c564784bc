"""The events of a search, as values: the journal stores them and MLflow receives them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from orchestrator.job.space import TrialSpec
from orchestrator.tuning.reports import Copied, Costs, Report


def now() -> int:
    """Return the time in milliseconds since the epoch, as MLflow counts it."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Started:
    """A trial has started."""

    trial: str
    config: dict[str, Any]
    at: int = field(default_factory=now)


@dataclass(frozen=True)
class Reported:
    """A trial was evaluated."""

    report: Report
    at: int = field(default_factory=now)


@dataclass(frozen=True)
class Ended:
    """A trial has ended, with its status and the reason."""

    trial: str
    status: str
    note: str
    at: int = field(default_factory=now)


@dataclass(frozen=True)
class Found:
    """A fact about the whole search, determined once: its baselines, its base model."""

    name: str
    value: Any
    at: int = field(default_factory=now)


Event: TypeAlias = Started | Reported | Ended | Found
KINDS: dict[str, type[Event]] = {
    "started": Started,
    "reported": Reported,
    "ended": Ended,
    "found": Found,
}


def to_document(event: Event) -> dict[str, Any]:
    """Return the event as the journal stores it.

    A report goes without its checkpoint, which has a file of its own.
    """
    kind = next(kind for kind, known in KINDS.items() if isinstance(event, known))
    document = {"kind": kind, **asdict(event)}
    if isinstance(event, Reported):
        del document["report"]["checkpoint"], document["report"]["pending"]
    return document


def from_document(document: dict[str, Any]) -> Event:
    """Return the event that a document stands for.

    Raises KeyError or TypeError for a document that is not an event.
    """
    fields = {key: value for key, value in document.items() if key != "kind"}
    if document["kind"] == "reported":
        report = fields["report"]
        own = {"copied": _copied(report["copied"]), "costs": Costs(**report.get("costs", {}))}
        fields["report"] = Report(**{**report, **own}, checkpoint=b"")
    event: Event = KINDS[document["kind"]](**fields)
    return event


def _copied(document: dict[str, Any] | None) -> Copied | None:
    if document is None:
        return None
    return Copied(document["source"], document["step"], TrialSpec(**document["spec"]))
