"""Listings read from the tables equal those of MLflow's client.

Wherever they could differ, MLflow's client is used.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator.errors import Unreachable
from orchestrator.registry import Registry
from orchestrator.registry.mlflow_internals.tables import SCHEMA, read_models
from tests.filled_store import fill

TOOL = """
import sys
from orchestrator.registry import Registry
print(len(Registry({uri!r}).list_models()), "mlflow" in sys.modules)
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A database with models of several kinds.

    Two models have three versions, one of which is deleted; one model has none, and one is another
    program's. There is an alias besides the champion, and one of MLflow's own text templates.
    """
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = Registry(uri)
    registry.check()
    fill(uri, 2, 3)
    client = registry._store.client
    client.set_registered_model_alias("m0001", "canary", "3")
    client.set_model_version_tag("m0001", "2", "edited", "by hand")
    client.create_registered_model("empty")
    client.create_registered_model("other's", tags={"team": "another"})
    client.create_model_version("other's", "/elsewhere")
    client.set_registered_model_alias("other's", "champion", "1")
    client.register_prompt("greeting", "Hello {{name}}")
    client.delete_model_version("m0000", "3")
    return uri


def alone(uri: str, **environment: str) -> Any:
    return read_models(uri, environment)


def test_the_tables_say_what_mlflow_says(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables and MLflow's client give the same listings.

    These have names, newest versions, aliases, champions' metrics, polled aliases and canaries.
    """
    registry = Registry(uri)
    assert read_models(uri) is not None
    direct = registry.list_models(), registry.live(), registry.snapshot()
    monkeypatch.setattr("orchestrator.registry.registry.read_models", lambda uri: None)
    assert (registry.list_models(), registry.live(), registry.snapshot()) == direct
    listed = {model.name: model for model in direct[0]}
    assert list(listed) == ["empty", "m0000", "m0001", "other's"]
    assert (listed["m0000"].latest, listed["m0001"].latest, listed["empty"].latest) == (2, 3, None)
    assert listed["m0001"].aliases == {"champion": 1, "canary": 3}
    assert not listed["other's"].is_prompt and listed["m0001"].champion_metrics == {
        "test": {"accuracy": 0.9}
    }


def test_the_schema_is_that_of_the_mlflow_here(uri: str) -> None:
    """A new schema means that the tables must be checked again and SCHEMA changed."""
    with sa.create_engine(uri).connect() as connection:
        assert (
            connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
            == SCHEMA
        )


def test_a_listing_imports_no_mlflow(uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format(uri=uri)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        "4",
        "True",
    ]  # MLflow reads the version of a champion that has no note
    Registry(uri)._store.client.delete_registered_model_alias("other's", "champion")
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format(uri=uri)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "False"]


def _another_schema(uri: str) -> str:
    with sa.create_engine(uri).begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'of tomorrow'"))
    return uri


def _no_table(uri: str) -> str:
    with sa.create_engine(uri).begin() as connection:
        connection.execute(sa.text("DROP TABLE registered_model_aliases"))
    return uri


def _no_database(uri: str) -> str:
    Path(uri.removeprefix("sqlite:///")).write_bytes(b"no database at all " * 1000)
    return uri


ELSEWHERE: dict[str, Callable[[str], str]] = {
    "another schema": _another_schema,
    "a table is missing": _no_table,
    "no database": _no_database,
    "no file": lambda uri: uri + ".none",
    "a server": lambda uri: "http://127.0.0.1:9",
    "a database that is away": lambda uri: "postgresql://someone@127.0.0.1:9/none",
    "a database without a driver": lambda uri: "postgresql+nothing://127.0.0.1:9/none",
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_not_known_is_left_to_mlflow(uri: str, case: str) -> None:
    changed = ELSEWHERE[case](uri)
    assert alone(changed) is None
    assert not Path(changed.removeprefix("sqlite:///") + ".none").exists()


def test_workspaces_are_left_to_mlflow(uri: str) -> None:
    """With workspaces, only MLflow knows which team's models are meant."""
    assert alone(uri, MLFLOW_WORKSPACE="red") is None
    assert alone(uri, MLFLOW_ENABLE_WORKSPACES="true") is None
    assert len(alone(uri, MLFLOW_ENABLE_WORKSPACES="false")) == 4


def test_a_database_that_is_away_is_named() -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        Registry("postgresql://someone:secret@127.0.0.1:9/none").list_models()
