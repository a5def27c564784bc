"""Connecting: schema creation, outages, and the command that starts MLflow's pages."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from postgres import Cluster

from orchestrator.errors import BadInput, Unreachable
from orchestrator.registry import Registry, store

OPEN = (
    "from orchestrator.registry import Registry; r = Registry({uri!r}); "
    "r.check(); print(len(r.list_models()))"
)


def test_processes_that_open_a_new_file_at_once_all_succeed(tmp_path: Path) -> None:
    """All processes succeed, and only the database is left.

    MLflow alone would fail all but one of them.
    """
    code = OPEN.format(uri=f"sqlite:///{tmp_path}/new/mlflow.db")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=60) for process in processes]
    assert answers == [("0\n", "")] * 2
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mlflow.db"]


@pytest.mark.long
def test_programs_that_open_an_empty_postgresql_at_once_all_succeed(postgres: Cluster) -> None:
    code = OPEN.format(uri=postgres.database("at_once"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=200) for process in processes] == [("0\n", "")] * 3


def test_a_dead_port_is_reported_within_ten_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(Unreachable, match=rf"http://\*\*\*@127.0.0.1:{port}") as failure:
        Registry(f"http://me:secret@127.0.0.1:{port}").check()
    assert time.monotonic() - started < 10
    assert "secret" not in str(failure.value)
    assert "mlflow server" in failure.value.hint and "MLFLOW_TRACKING_URI" in failure.value.hint


def test_a_port_that_accepts_and_never_answers_is_reported_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our own time limit applies; MLflow's timeouts and retries would take minutes."""
    assert store.CHECK_SECONDS < 10
    monkeypatch.setattr(store, "CHECK_SECONDS", 1.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        started = time.monotonic()
        with pytest.raises(Unreachable, match="no answer within 1 s"):
            Registry(f"http://127.0.0.1:{mute.getsockname()[1]}").check()
        assert time.monotonic() - started < 3


def test_a_database_driver_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown driver") as refusal:
        Registry("mssql+nosuchdriver://me:secret@127.0.0.1/db").check()
    assert "secret" not in str(refusal.value)


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(Unreachable, match="not a database"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db").check()


def test_checking_creates_nothing(registry: Registry) -> None:
    before = registry._store.client.search_experiments()
    registry.check()
    assert [it.name for it in registry._store.client.search_experiments()] == [
        it.name for it in before
    ]


def test_pages_are_started_on_loopback_and_passwords_stay_off_the_command_line(
    tmp_path: Path,
) -> None:
    command = Registry(f"sqlite:///{tmp_path}/mlflow.db").ui_command(5001)
    assert command.argv[command.argv.index("--host") + 1] == "127.0.0.1" and "5001" in command.argv
    assert command.env["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert "secret" not in " ".join(Registry("postgresql://me:secret@db/mlflow").ui_command().argv)
    with pytest.raises(BadInput, match="has its own pages"):
        Registry("http://127.0.0.1:5000").ui_command()
