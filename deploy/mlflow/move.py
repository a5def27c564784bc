"""Move an MLflow store to another database: every experiment, run, model, version, alias and history.

    python deploy/mlflow/move.py sqlite:///mlflow.db postgresql+psycopg://mlflow@host/mlflow \
        --artifacts ./mlruns --to ./mlflow-data/artifacts

Stop whatever writes to the old store first. The new database must be empty; both are of the MLflow that runs this. The
old store is only read, and nothing is written to the new one unless everything is. Artifacts are copied (to a folder
that the new server has as its --artifacts-destination), and what pointed into the old folder then points to the server.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

BATCH = 2000
VERSIONS = "alembic_version"
# Columns that say where artifacts lie.
LOCATIONS = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def main() -> int:
    args = arguments()
    old, new = sa.create_engine(args.source), sa.create_engine(args.target)
    prepare(args.target)
    before, after = reflected(old), reflected(new)
    if (mine := schema(old, before)) != (theirs := schema(new, after)):
        return fail(
            f"the schemas differ: {mine} and {theirs}",
            f"mlflow db upgrade {args.source}, after a backup",
        )
    with new.begin() as connection:
        if busy := filled(connection, after):
            return fail(
                f"the new database is not empty: {', '.join(busy)}", "give an empty database"
            )
        with old.connect() as reading:
            counts = copy(reading, connection, before, after, args)
        restart_sequences(connection, after)
    if args.artifacts:
        shutil.copytree(args.artifacts, args.to, dirs_exist_ok=True)
    print(", ".join(f"{name} {count}" for name, count in counts.items() if count))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the old store's database")
    parser.add_argument("target", help="the new, empty database")
    parser.add_argument(
        "--artifacts", type=Path, help="folder that the old store has its artifacts in"
    )
    parser.add_argument("--to", type=Path, help="artifact folder of the new server")
    args = parser.parse_args()
    if bool(args.artifacts) != bool(args.to):
        parser.error("--artifacts and --to belong together")
    if args.artifacts and not args.artifacts.is_dir():
        parser.error(f"{args.artifacts} is not a folder")
    return args


def prepare(target: str) -> None:
    """Let MLflow make its tables in the new database."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(target)
    if not sa.inspect(engine).has_table(VERSIONS):
        _initialize_tables(engine)


def reflected(engine: sa.Engine) -> sa.MetaData:
    tables = sa.MetaData()
    tables.reflect(engine)
    return tables


def schema(engine: sa.Engine, tables: sa.MetaData) -> str:
    if VERSIONS not in tables.tables:
        return "no MLflow database"
    with engine.connect() as connection:
        return str(connection.execute(sa.select(tables.tables[VERSIONS].c.version_num)).scalar())


def filled(connection: sa.Connection, tables: sa.MetaData) -> list[str]:
    """Tables with more in them than a new store has: its default experiment and workspace."""
    own = {VERSIONS: 1, "experiments": 1, "workspaces": 1}
    return [
        table.name
        for table in tables.sorted_tables
        if connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        > own.get(table.name, 0)
    ]


def copy(
    reading: sa.Connection,
    writing: sa.Connection,
    before: sa.MetaData,
    after: sa.MetaData,
    args: argparse.Namespace,
) -> dict[str, int]:
    """Every table's rows, those that others refer to first; returns how many."""
    for table in reversed(after.sorted_tables):
        if table.name != VERSIONS:
            writing.execute(table.delete())
    counts = {}
    for table in after.sorted_tables:
        if table.name == VERSIONS or table.name not in before.tables:
            continue
        counts[table.name] = 0
        for rows in batches(reading, before.tables[table.name]):
            writing.execute(table.insert(), [fitted(table, row, args) for row in rows])
            counts[table.name] += len(rows)
    return counts


def batches(reading: sa.Connection, table: sa.Table) -> Iterator[list[dict[str, Any]]]:
    found = reading.execution_options(yield_per=BATCH).execute(sa.select(table))
    for rows in found.mappings().partitions(BATCH):
        yield [dict(row) for row in rows]


def fitted(table: sa.Table, row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A row as the new database takes it: SQLite keeps truth values as numbers; artifacts move."""
    for column in table.columns:
        if isinstance(column.type, sa.Boolean) and row.get(column.name) is not None:
            row[column.name] = bool(row[column.name])
    for name in LOCATIONS.get(table.name, []):
        row[name] = moved(row[name], args.artifacts)
    return row


def moved(location: str | None, folder: Path | None) -> str | None:
    """A place in the old folder, as the server names it; anything else stays."""
    if location is None or folder is None:
        return location
    root = str(folder.resolve())
    path = location.removeprefix("file://")
    if path != root and not path.startswith(root + "/"):
        return location
    return f"mlflow-artifacts:{path.removeprefix(root) or '/'}"


def restart_sequences(connection: sa.Connection, tables: sa.MetaData) -> None:
    """PostgreSQL counts on from its own sequences, which know nothing of copied numbers."""
    if connection.dialect.name != "postgresql":
        return
    for table in tables.sorted_tables:
        for column in table.primary_key.columns:
            name = connection.execute(
                sa.text("SELECT pg_get_serial_sequence(:table, :column)"),
                {"table": table.name, "column": column.name},
            ).scalar() if isinstance(column.type, sa.Integer) else None  # fmt: skip
            if name:
                top = connection.execute(sa.select(sa.func.max(column))).scalar()
                connection.execute(
                    sa.text("SELECT setval(:name, :top)"), {"name": name, "top": max(1, top or 1)}
                )


def fail(problem: str, step: str) -> int:
    print(f"{problem}\n  next: {step}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
