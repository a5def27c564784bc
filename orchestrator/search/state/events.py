"""The events of a search, as values: the journal stores them and listeners receive them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from orchestrator.job.space import TrialSpec
from orchestrator.search.state.trials import TrialStatus
from orchestrator.tuning.reports import Copied, Costs, Report


def now() -> int:
    """Return the time in milliseconds since the epoch, as MLflow counts it."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Started:
    """A trial has started."""

    trial: str
    spec: TrialSpec
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
    status: TrialStatus
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


class Listener(Protocol):
    """A receiver of every trial's events in their order; it is called in the driver."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None: ...

    def trial_reported(self, trial: str, report: Report) -> None: ...

    def trial_ended(self, trial: str, status: TrialStatus, note: str) -> None: ...


def tell(event: Event, listener: Listener) -> None:
    """Pass an event on to a listener, which hears nothing of events of the whole search."""
    if isinstance(event, Started):
        listener.trial_started(event.trial, event.spec)
    elif isinstance(event, Reported):
        listener.trial_reported(event.report.trial, event.report)
    elif isinstance(event, Ended):
        listener.trial_ended(event.trial, event.status, event.note)


def to_document(event: Event) -> dict[str, Any]:
    """Return the event as the journal stores it.

    A spec is written as its configuration. A report goes without its checkpoint, which has a file
    of its own.
    """
    if isinstance(event, Started):
        config = event.spec.config()
        confirms = {"confirms": event.spec.confirms} if event.spec.confirms else {}
        return {
            "kind": "started", "trial": event.trial, "config": config, "at": event.at, **confirms,
        }  # fmt: skip
    kind = next(kind for kind, known in KINDS.items() if isinstance(event, known))
    document = {"kind": kind, **asdict(event)}
    if isinstance(event, Reported):
        del document["report"]["checkpoint"], document["report"]["pending"]
    return document


def from_document(document: dict[str, Any]) -> Event:
    """Return the event that a document stands for.

    Raises KeyError, TypeError, ValueError or BadInput for a document that is not an event.
    """
    fields = {key: value for key, value in document.items() if key != "kind"}
    if document["kind"] == "started":
        spec = TrialSpec.from_config(fields.pop("config"))
        fields["spec"] = replace(spec, confirms=fields.pop("confirms", ""))
    elif document["kind"] == "ended":
        fields["status"] = TrialStatus(fields["status"])
    elif document["kind"] == "reported":
        report = fields["report"]
        own = {"copied": _copied(report["copied"]), "costs": Costs(**report.get("costs", {}))}
        fields["report"] = Report(**{**report, **own}, checkpoint=b"")
    event: Event = KINDS[document["kind"]](**fields)
    return event


def _copied(document: dict[str, Any] | None) -> Copied | None:
    if document is None:
        return None
    return Copied(document["source"], document["step"], TrialSpec(**document["spec"]))
