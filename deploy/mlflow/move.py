"""Move an MLflow store to another database.

    python deploy/mlflow/move.py sqlite:///mlflow.db postgresql+psycopg://mlflow@host/mlflow \
        --artifacts ./mlruns --to ./mlflow-data/artifacts

Every experiment, run, model, version, alias and history is moved. Stop everything that writes to
the old store first. The new database must be empty. Both databases
must have the schema of the MLflow version that runs this script. The old store is only read, and
all rows are written to the new one in a single transaction. Artifacts are copied to the folder that
is the new server's --artifacts-destination; their locations are rewritten to point to the server.
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
# Columns that hold the locations of artifacts.
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
    """Create MLflow's tables in the new database."""
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
    """Return the tables with more rows than in a new store.

    A new store has a default experiment and a default workspace.
    """
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
    """Copy the rows of all tables, referenced tables first; return how many rows each table has."""
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
    """Fit a row to the new database.

    SQLite stores booleans as numbers, and locations of artifacts change.
    """
    for column in table.columns:
        if isinstance(column.type, sa.Boolean) and row.get(column.name) is not None:
            row[column.name] = bool(row[column.name])
    for name in LOCATIONS.get(table.name, []):
        row[name] = moved(row[name], args.artifacts)
    return row


def moved(location: str | None, folder: Path | None) -> str | None:
    """Turn a location in the old folder into the server's name for it; return others unchanged."""
    if location is None or folder is None:
        return location
    root = str(folder.resolve())
    path = location.removeprefix("file://")
    if path != root and not path.startswith(root + "/"):
        return location
    return f"mlflow-artifacts:{path.removeprefix(root) or '/'}"


def restart_sequences(connection: sa.Connection, tables: sa.MetaData) -> None:
    """Set PostgreSQL's sequences to the highest copied numbers.

    A sequence does not notice rows that are inserted with a number.
    """
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
