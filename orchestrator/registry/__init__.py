"""MLflow behind one door: search logging, registered models, aliases, artifacts. Only this package imports mlflow.

Importing it is cheap: mlflow itself is imported by the first call that needs the store.
"""

from orchestrator.registry.canary import Canary, LiveModel
from orchestrator.registry.evaluations import EvaluationRecord
from orchestrator.registry.history import Move
from orchestrator.registry.ledger import Overtaken
from orchestrator.registry.records import AliasOutcome, ModelSummary, UiCommand, VersionDetail, VersionSummary
from orchestrator.registry.refs import ModelRef, parse_ref, printable
from orchestrator.registry.registry import CHAMPION, Registry, check_alias, check_name
from orchestrator.registry.search_log import SearchLog

__all__ = [
    "CHAMPION",
    "AliasOutcome",
    "Canary",
    "LiveModel",
    "EvaluationRecord",
    "ModelRef",
    "ModelSummary",
    "Move",
    "Overtaken",
    "Registry",
    "SearchLog",
    "UiCommand",
    "VersionDetail",
    "VersionSummary",
    "check_alias",
    "check_name",
    "parse_ref",
    "printable",
]
