"""deploy/mlflow: the server with logins as start.sh starts it, and a move to PostgreSQL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from mlflow_server import Server
from object_store import object_store, why_no_object_store
from postgres import Cluster

from orchestrator.errors import BadInput
from orchestrator.registry import Registry

DEPLOY = Path(__file__).parents[2] / "deploy" / "mlflow"
PASSWORD = "a-long-password-of-ours"


@pytest.fixture(params=["folder", "bucket"])
def artifacts(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings of start.sh for artifacts in its own folder, and in an object store."""
    if request.param == "folder":
        yield {}
        return
    if reason := why_no_object_store():
        pytest.skip(reason)
    with object_store("prompts") as environment:
        yield {**environment, "ARTIFACTS": "s3://prompts/of/mlflow"}


@pytest.fixture
def guarded(postgres: Cluster, tmp_path: Path, artifacts: dict[str, str]) -> Iterator[Server]:
    """The server as start.sh starts it, on a PostgreSQL that is already running."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    database = postgres.database(f"guarded{len(artifacts)}").replace("+psycopg", "")
    settings = {
        "DATA": str(tmp_path / "data"),
        "POSTGRES_URI": database,
        "PORT": str(port),
        "WORKERS": "1",
        "PYTHON": sys.executable,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        **artifacts,
    }
    server = Server(tmp_path)
    server.port, server.uri = port, f"http://127.0.0.1:{port}"
    with (tmp_path / "server.log").open("ab") as log:
        server.process = subprocess.Popen(
            [DEPLOY / "start.sh"],
            env=os.environ | settings,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        server.await_answer()
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)
        try:
            server.process.wait(timeout=20)
        finally:
            server.stop()


@pytest.mark.long
@pytest.mark.slow
def test_a_server_with_logins_starts_by_one_command(
    guarded: Server,
    artifacts: dict[str, str],
    name: str,
    make_artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server requires a login, the history names it, and secrets stay secret.

    Clients need no keys of the object store; the server has them.
    """
    with pytest.raises(BadInput, match="does not let this login") as refusal:
        Registry(guarded.uri).check()
    assert "MLFLOW_TRACKING_USERNAME" in refusal.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    registry = Registry(guarded.uri, cache_dir=tmp_path / "cache")
    with registry.start_search(name, {}, {}) as search:
        version = registry.register(make_artifact(), name, search.run_id)
    registry.promote(name, version)
    assert registry.history(name)[0].by == "admin"
    fetched = registry.fetch(name, version)
    assert {file.name for file in fetched.iterdir()} >= {"manifest.json", "prompt.safetensors"}
    kept = list((tmp_path / "data" / "artifacts").rglob("prompt.safetensors"))
    assert len(kept) == (0 if artifacts else 1)
    assert (tmp_path / "data" / "secrets.env").stat().st_mode & 0o077 == 0
    assert PASSWORD not in (tmp_path / "server.log").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_store_moves_to_postgres_with_all_it_has(
    tmp_path: Path, postgres: Cluster, name: str, make_artifact: Callable[..., Path]
) -> None:
    """Runs, metrics, versions, aliases, histories and artifacts move to the new store.

    The new store's numbers continue where the old one's ended.
    """
    source, target = f"sqlite:///{tmp_path}/mlflow.db", postgres.database("moved")
    old = Registry(source, cache_dir=tmp_path / "old-cache")
    with old.start_search(name, {"p": 1}, {}) as search:
        search.trial_started("t1", {"seed": 0})
        search.trial_metrics("t1", 10, {"loss": 0.5})
        search.trial_ended("t1", "finished")
        for accuracy in (0.8, 0.9):
            old.register(make_artifact(accuracy=accuracy), name, search.run_id)
    old.promote(name, 1)
    old.promote(name, 2)
    files = tmp_path / "new" / "artifacts"
    argv = [
        sys.executable,
        DEPLOY / "move.py",
        source,
        target,
        "--artifacts",
        tmp_path / "mlruns",
        "--to",
        files,
    ]
    moved = subprocess.run(argv, capture_output=True, text=True)
    assert moved.returncode == 0, moved.stderr
    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 2 and "is not empty" in again.stderr
    (tmp_path / "mlruns").rename(tmp_path / "away")
    server = Server(tmp_path / "new", target).start()
    try:
        new = Registry(server.uri, cache_dir=tmp_path / "new-cache")
        assert new.aliases(name) == old.aliases(name) and new.history(name) == old.history(name)
        assert [it.tags for it in new.versions(name)] == [it.tags for it in old.versions(name)]
        client = new._store.client
        assert client.get_metric_history(search.run_ids["t1"], "loss")[0].value == 0.5
        assert new.rollback(name) == (2, 1)
        with new.start_search(name, {}, {}) as later:
            assert new.register(make_artifact(accuracy=0.95), name, later.run_id) == 3
        with new.start_search(f"{name}-other", {}, {}) as other:
            assert int(other.experiment_id) > int(search.experiment_id)
    finally:
        server.stop()


def test_the_compose_file_starts_the_same_script() -> None:
    """The file has the script, secrets that must be given and ports on loopback only.

    The file is only read, so no container engine is needed.
    """
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    server = document["services"]["mlflow"]
    assert server["build"] == "." and 'CMD ["/start.sh"]' in (DEPLOY / "Dockerfile").read_text()
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    for service, variable in (
        ("postgres", "POSTGRES_PASSWORD"),
        ("mlflow", "MLFLOW_AUTH_ADMIN_PASSWORD"),
    ):
        assert ":?" in document["services"][service]["environment"][variable]
    read = {name for name in server["environment"] if not name.startswith(("AWS_", "MLFLOW_"))}
    script = (DEPLOY / "start.sh").read_text()
    assert all(name in script for name in read)


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    """A missing package is named before a secret or a database is made."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    settings = {"DATA": str(tmp_path / "data"), "PYTHON": str(python)}
    said = subprocess.run(
        [DEPLOY / "start.sh"], env=os.environ | settings, capture_output=True, text=True
    )
    assert said.returncode == 2 and "prompt-orchestrator[server]" in said.stderr
    assert not list((tmp_path / "data").iterdir())
