"""Search logs, registered models, aliases and artifacts in MLflow.

Only this package imports mlflow. Importing this package is cheap: mlflow itself is imported by the
first call that needs the store.
"""

from orchestrator.registry.aliases.canary import Canary, LiveModel
from orchestrator.registry.aliases.gate import tagged_metric
from orchestrator.registry.aliases.ledger import Overtaken
from orchestrator.registry.aliases.moves import Move
from orchestrator.registry.registry import CHAMPION, Registry, check_alias, check_name
from orchestrator.registry.runs.search_log import SearchLog
from orchestrator.registry.versions.evaluations import EvaluationRecord, read_evaluations
from orchestrator.registry.versions.records import (
    SEEDS_TAG,
    AliasOutcome,
    ModelSummary,
    SeedSpread,
    UiCommand,
    VersionDetail,
    VersionSummary,
)
from orchestrator.registry.versions.refs import ModelRef, parse_ref, printable

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
    "SEEDS_TAG",
    "SearchLog",
    "SeedSpread",
    "UiCommand",
    "VersionDetail",
    "VersionSummary",
    "check_alias",
    "check_name",
    "parse_ref",
    "printable",
    "read_evaluations",
    "tagged_metric",
]
