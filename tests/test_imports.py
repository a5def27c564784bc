"""Import rules without an import-linter contract: single importers and light starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"
INTERNALS = "cluster/ray_internals"
ONLY_IN = {
    "ray.tune": {"search/study/study.py", f"{INTERNALS}/tune.py"},
    "ray.train": {"search/workers/train_group.py", f"{INTERNALS}/train.py"},
    "ray.serve": {"serving/app.py"},
    "optuna": {"search/study/tpe.py"},
    "ray.job_submission": {f"{INTERNALS}/jobs.py"},
}
PRIVATE = re.compile(r"ray\._(?!_)|ray\.\w+(\.\w+)*\._|ray\.(core\.generated|tune\.execution)")
"""Names that begin with an underscore below Ray, and modules that Ray does not document."""
MLFLOW_PRIVATE = re.compile(r"mlflow\.(store|utils)\b|mlflow(\.\w+)*\._(?!_)")


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what is imported for type checkers alone, as import-linter does."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return ast.Pass()
        return self.generic_visit(node)


def code_of(file: Path) -> ast.AST:
    """Return what the module runs."""
    return WithoutTypes().visit(ast.parse(file.read_text(encoding="utf-8")))


def imported(file: Path) -> Iterator[str]:
    """Return all modules imported by the file at any depth, also ``from ray import tune``."""
    for node in ast.walk(code_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", ONLY_IN)
def test_each_heavy_integration_is_imported_by_one_file_only(module: str) -> None:
    """ray.tune, ray.train, ray.serve, ray.job_submission and optuna each have one importer.

    Beside it there may be the module that relies on the library's internals.
    """
    importers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in imported(file))
    }
    assert importers == ONLY_IN[module]


def uses(file: Path, private: re.Pattern[str]) -> bool:
    """Tell whether the file's code, without its comments, matches the pattern."""
    text = file.read_text(encoding="utf-8")
    return bool(private.search(text) and private.search(ast.unparse(code_of(file))))


@pytest.mark.parametrize(
    ("private", "fence"),
    [(PRIVATE, INTERNALS), (MLFLOW_PRIVATE, "registry/mlflow_internals")],
    ids=["ray", "mlflow"],
)
def test_internals_of_a_library_stay_behind_their_fence(
    private: re.Pattern[str], fence: str
) -> None:
    """Private names of Ray and MLflow occur in one package each, and nowhere else."""
    users = {
        str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if uses(file, private)
    }
    assert users and {user for user in users if not user.startswith(f"{fence}/")} == set()


def test_only_the_registry_imports_mlflow() -> None:
    """mlflow is imported inside orchestrator/registry and nowhere else."""
    importers = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "mlflow" for name in imported(file))
    }
    assert importers == {"registry"}
