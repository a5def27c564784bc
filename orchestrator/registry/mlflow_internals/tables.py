"""A fast path that reads registered models straight from a database's tables.

Importing mlflow takes longer than listing a thousand models. A listing needs four tables that have
hardly changed in years. They are read directly when the database has the schema that the tests
compare this module with, and when no unusual feature such as MLflow workspaces is in use. All other
cases, and every error, are left to MLflow's own client.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

from orchestrator.registry.store import CHECK_SECONDS, sqlite_file

SCHEMA = "dc11669786a5"
"""The schema revision of MLflow 3.17, as stored in the table alembic_version."""
WORKSPACE = "default"
SEVERAL_WORKSPACES = ("MLFLOW_ENABLE_WORKSPACES", "MLFLOW_WORKSPACE")
OF_MLFLOW = "mlflow.prompt.is_prompt"
"""Marks MLflow's own text templates, which share the table of registered models but are not listed.
"""
DELETED = "Deleted_Internal"


@dataclass
class ModelRow:
    """The columns of one registered model that a listing shows."""

    name: str
    newest: int | None = None
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def read_models(uri: str, environment: Mapping[str, str] = os.environ) -> list[ModelRow] | None:
    """Read every registered model of an SQLite file or a PostgreSQL database.

    Returns None where only MLflow's client can answer: the store is of another kind or has an
    unknown schema, workspaces are enabled, or the database reports an error.
    """
    file = sqlite_file(uri)
    direct = file.is_file() if file else uri.startswith("postgresql")
    if not direct or any(
        environment.get(name, "").lower() not in ("", "false", "0") for name in SEVERAL_WORKSPACES
    ):
        return None
    import sqlalchemy as sa

    timeout = {"timeout" if file else "connect_timeout": int(CHECK_SECONDS)}
    try:
        engine = sa.create_engine(uri, connect_args=timeout)
        try:
            with engine.connect() as connection:
                return _read(connection)
        finally:
            engine.dispose()
    except (sa.exc.SQLAlchemyError, ImportError):
        return None  # MLflow's client will hit the same error, and Store translates it


def _read(connection: Connection) -> list[ModelRow] | None:
    if [tuple(row) for row in _rows(connection, "SELECT version_num FROM alembic_version")] != [
        (SCHEMA,)
    ]:
        return None
    of_workspace = "FROM {} WHERE workspace = :workspace"

    def rows(columns: str, table: str, more: str = "") -> Any:
        return _rows(
            connection, f"SELECT {columns} {of_workspace.format(table)} {more}", workspace=WORKSPACE
        )

    models = {name: ModelRow(name) for (name,) in rows("name", "registered_models")}
    # Receives the rows of a model that was registered between two statements.
    unlisted = ModelRow("")
    for name, key, value in rows("name, key, value", "registered_model_tags"):
        models.get(name, unlisted).tags[key] = value or ""
    for name, alias, version in rows("name, alias, version", "registered_model_aliases"):
        models.get(name, unlisted).aliases[alias] = int(version)
    alive = f"AND current_stage <> '{DELETED}' GROUP BY name"
    for name, version in rows("name, max(version)", "model_versions", alive):
        models.get(name, unlisted).newest = int(version)
    return [model for model in models.values() if model.tags.get(OF_MLFLOW, "").lower() != "true"]


def _rows(connection: Connection, statement: str, **values: Any) -> Any:
    import sqlalchemy as sa

    return connection.execute(sa.text(statement), values)
