"""Import rules without an import-linter contract: single importers and light starts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
ONLY_IN = {
    "ray.tune": "search/study/study.py",
    "ray.train": "search/workers/train_group.py",
    "ray.serve": "serving/app.py",
    "optuna": "search/study/tpe.py",
    "ray.job_submission": "cluster/submit/job_server.py",
}


def imported(file: Path) -> Iterator[str]:
    """Return all modules imported by the file at any depth, also ``from ray import tune``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", ONLY_IN)
def test_each_heavy_integration_is_imported_by_one_file_only(module: str) -> None:
    """ray.tune, ray.train, ray.serve, ray.job_submission and optuna each have one importer."""
    importers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in imported(file))
    }
    assert importers == {ONLY_IN[module]}


def test_only_the_registry_imports_mlflow() -> None:
    """mlflow is imported inside orchestrator/registry and nowhere else."""
    importers = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "mlflow" for name in imported(file))
    }
    assert importers == {"registry"}
