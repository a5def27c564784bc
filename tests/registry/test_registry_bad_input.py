"""Failures of a shared registry: each ends with a clear message and no half-done move."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from postgres import Cluster

from orchestrator.artifact import WEIGHTS
from orchestrator.errors import BadInput, OrchestratorError, Unreachable
from orchestrator.registry import Registry, store

Serve = Callable[..., int]
ODD = {
    "slash": "a/b",
    "newline": "line\nbreak",
    "markup": "<script>alert(1)</script>",
    "long": "x" * 300,
    "none": "",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_names_that_no_model_may_have(
    served: Registry, odd: str, make_artifact: Callable[..., Path]
) -> None:
    """Invalid names are refused before anything is written, with a message of one line.

    Lookups of such names are refused in the same way.
    """
    before = served.list_models()
    for call in (
        lambda: served.register(make_artifact(), odd, "0" * 32),
        lambda: served.promote(odd, 1),
        lambda: served.rollback(odd),
        lambda: served.versions(odd),
        lambda: served.set_alias(odd, "staging", 1),
    ):
        with pytest.raises(BadInput) as refusal:
            call()
        assert refusal.value.message.isprintable()
    assert served.list_models() == before


@pytest.mark.parametrize("alias", ["latest", "v1", "V22", "a.b", "", "a b", "x" * 300, "a\nb"])
def test_aliases_that_mlflow_keeps_for_itself(served: Registry, name: str, alias: str) -> None:
    for call in (lambda: served.set_alias(name, alias, 1), lambda: served.promote(name, 1, alias)):
        with pytest.raises(BadInput, match="can't be an alias"):
            call()


def stored(registry: Registry, name: str, version: int, folder: Path) -> Path:
    """Return the artifact's folder in the server's own files."""
    location = registry._store.client.get_model_version_download_uri(name, str(version))
    path = location.removeprefix("mlflow-artifacts:/").lstrip("/")
    return folder / "artifacts" / path / "artifacts" / "prompt"


@pytest.fixture(params=["server", pytest.param("postgres_server", marks=pytest.mark.long)])
def broken(request: pytest.FixtureRequest, tmp_path: Path, name: str, make_artifact: Any) -> Any:
    """A registry with a champion and a better version, whose files a test may damage."""
    server = request.getfixturevalue(request.param)
    registry = Registry(server.uri, cache_dir=tmp_path / "cache")
    with registry.start_search(name, {}, {}) as search:
        for accuracy in (0.8, 0.9):
            registry.register(make_artifact(accuracy=accuracy), name, search.run_id)
    registry.promote(name, 1)
    return registry, stored(registry, name, 2, server.folder)


def test_a_version_whose_files_are_gone_or_altered_is_not_promoted(broken: Any, name: str) -> None:
    """Unreadable versions are not promoted, even by force; champion and history stay."""
    registry, files = broken
    kept = files.with_name("kept")
    shutil.copytree(files, kept)
    weights = files / WEIGHTS
    spoilt: dict[str, Callable[[], Any]] = {
        "altered": lambda: weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f"),
        "should hold": weights.unlink,
        "no prompt artifact|can't be read|No such|should hold": lambda: shutil.rmtree(files),
    }
    for reason, spoil in spoilt.items():
        spoil()
        for force in (None, "because"):
            with pytest.raises(BadInput, match=reason):
                registry.promote(name, 2, force_reason=force)
        shutil.rmtree(files, ignore_errors=True)
        shutil.copytree(kept, files)
    outcome = registry.history(name)
    assert [(move.old, move.new) for move in outcome] == [(None, 1)] and registry.aliases(name) == {
        "champion": 1
    }
    shutil.rmtree(kept)
    assert registry.promote(name, 2) == (1, 2)


def test_a_champion_that_cannot_be_read_needs_a_reason_to_be_replaced(
    broken: Any, name: str
) -> None:
    """An unreadable champion can't be compared with, but a reason allows replacing it."""
    registry, files = broken
    registry.promote(name, 2)
    shutil.rmtree(registry.cache_dir)
    shutil.rmtree(files)
    with pytest.raises(BadInput, match="its holder can't be read to compare"):
        registry.promote(name, 1)
    assert registry.promote(name, 1, force_reason="its files were deleted") == (2, 1)
    with pytest.raises(BadInput):
        registry.rollback(name)
    assert registry.aliases(name) == {"champion": 1}


@pytest.fixture
def on_postgres(postgres: Cluster, tmp_path: Path, make_artifact: Any) -> tuple[str, Registry]:
    """A registry directly on its own PostgreSQL database, and the database's address."""
    uri = postgres.database(f"own_{tmp_path.name[-40:]}".lower().replace("-", "_"))
    registry = Registry(uri, cache_dir=tmp_path / "cache")
    registry.check()
    return uri, registry


@pytest.mark.long
def test_a_registry_that_may_only_be_read(
    on_postgres: tuple[str, Registry],
    name: str,
    make_artifact: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading works, every move is refused with a message, and none is half done."""
    monkeypatch.chdir(tmp_path)
    uri, registry = on_postgres
    with registry.start_search(name, {}, {}) as search:
        for accuracy in (0.8, 0.9):
            registry.register(make_artifact(accuracy=accuracy), name, search.run_id)
    registry.promote(name, 1)
    engine = sa.create_engine(uri)
    with engine.connect() as connection:
        database = engine.url.database
        connection.execute(
            sa.text(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
        )
        connection.commit()
    code = (
        "from pathlib import Path; from orchestrator.registry import Registry; "
        "from orchestrator.errors import *\n"
        f"r = Registry({uri!r}, cache_dir=Path({str(registry.cache_dir)!r})); r.check()\n"
        f"print(len(r.versions({name!r})), r.aliases({name!r}), len(r.history({name!r})))\n"
        f"for call in (lambda: r.promote({name!r}, 2), lambda: r.set_alias({name!r}, 'x', 1),\n"
        f"             lambda: r.start_search('s', {{}}, {{}}), "
        f"lambda: r.register(Path({str(make_artifact())!r}),\n"
        f"             {name!r}, {search.run_id!r})):\n"
        "    try: call()\n"
        "    except BadInput as error: print('may only be read' in error.message)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["2 {'champion': 1} 1", *["True"] * 4]
    engine.dispose()


def test_a_registry_that_is_down_or_silent(
    broken: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A promotion during an outage raises Unreachable and moves nothing."""
    registry, _ = broken
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        silent = Registry(f"http://127.0.0.1:{mute.getsockname()[1]}", cache_dir=tmp_path)
        monkeypatch.setattr(store, "CHECK_SECONDS", 0.5)
        with pytest.raises(Unreachable, match="no answer"):
            silent.check()
    client = registry._store.client
    monkeypatch.setattr(client, "log_param", lambda *_: lost())
    with pytest.raises(Unreachable, match="moving champion"):
        registry.promote(name, 2)
    monkeypatch.undo()
    assert registry.aliases(name) == {"champion": 1} and len(registry.history(name)) == 1


def lost() -> None:
    raise ConnectionError("connection reset by peer")


def test_a_slow_registry_is_waited_for(broken: Any, name: str) -> None:
    """A registry that answers slowly is not taken for one that is down."""
    registry, _ = broken
    with slowed(registry.tracking_uri, 0.3) as uri:
        started = time.monotonic()
        assert Registry(uri, cache_dir=registry.cache_dir).promote(name, 2) == (1, 2)
        assert time.monotonic() - started > 0.3


class slowed:
    """A TCP relay that delays every connection to an address by some seconds."""

    def __init__(self, uri: str, seconds: float) -> None:
        self.target = ("127.0.0.1", int(uri.rpartition(":")[2]))
        self.seconds = seconds

    def __enter__(self) -> str:
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            time.sleep(self.seconds)
            server = socket.create_connection(self.target)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a store's database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/mlflow.db"
    else:
        yield request.getfixturevalue("postgres").database(f"schema_{os.getpid()}")


def test_a_schema_of_another_mlflow_is_named_with_the_way_out(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older schema needs an upgrade, a newer one a newer MLflow; neither is changed."""
    Registry(database).check()
    engine = sa.create_engine(database)
    for revision, message, hint in (
        ("181f10493468", "out-of-date", "mlflow db upgrade"),
        ("ffffffffffff", "newer MLflow", "pip install --upgrade mlflow"),
    ):
        with engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE alembic_version SET version_num = '{revision}'"))
        code = (
            "from orchestrator.registry import Registry; from orchestrator.errors import BadInput\n"
            f"try: Registry({database!r}).check()\n"
            "except BadInput as error: print(error.message, '|', error.hint)"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        said, _, next_step = answer.stdout.partition("|")
        assert message in said and hint in next_step
        with engine.connect() as connection:
            assert (
                connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
                == revision
            )
    engine.dispose()


def test_errors_of_a_store_that_may_only_be_read_or_wants_a_login(local: Registry) -> None:
    from mlflow.exceptions import MlflowException

    for text, said in (
        ("(sqlite3.OperationalError) attempt to write a readonly database", "may only be read"),
        (
            "API request to endpoint /x failed with error code 401 != 200",
            "does not let this login do that",
        ),
    ):
        error = local._store.translate(MlflowException(text), "promoting")
        assert isinstance(error, BadInput) and said in error.message
    assert isinstance(local._store.translate(ConnectionError("x"), "promoting"), OrchestratorError)
