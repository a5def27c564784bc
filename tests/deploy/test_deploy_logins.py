"""deploy/mlflow/logins.py on a real server with logins: who may do what afterwards.

start.sh starts the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server
from test_artifact import PROMPT, manifest

from orchestrator.artifact import PromptArtifact
from orchestrator.errors import BadInput, OrchestratorError
from orchestrator.registry import Registry
from tests.deploy.manifests import DEPLOY

SCRIPT = DEPLOY / "mlflow" / "logins.py"


def logins(uri: str, **passwords: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": "the-admin-password",
        **{f"LOGIN_{name.upper()}": password for name, password in passwords.items()},
    }
    argv = [sys.executable, SCRIPT, "tuning", "serving"]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_it_says_what_is_missing() -> None:
    """A missing password is named before any server is contacted."""
    done = logins("http://127.0.0.1:1", tuning="x")
    assert (
        done.returncode == 2
        and "LOGIN_SERVING" in done.stderr
        and "LOGIN_TUNING" not in done.stderr
    )


@contextmanager
def server_with_logins(tmp_path: Path) -> Iterator[Server]:
    """Run an MLflow server that requires logins, started by start.sh."""
    server = Server(tmp_path)
    settings = {
        "DATA": str(tmp_path / "data"),
        "POSTGRES_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PORT": str(server.port),
        "WORKERS": "1",
        "PYTHON": sys.executable,
        "MLFLOW_AUTH_ADMIN_PASSWORD": "the-admin-password",
    }
    with (tmp_path / "server.log").open("ab") as log:
        server.process = subprocess.Popen(
            [DEPLOY / "mlflow" / "start.sh"],
            env=os.environ | settings,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        server.await_answer(seconds=240)  # four processes import MLflow first
        yield server
    finally:
        server.stop()


def become(patch: pytest.MonkeyPatch, name: str, password: str) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", name)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


@pytest.mark.long
@pytest.mark.slow
def test_searches_write_and_the_service_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both logins work, and a new password replaces the old one.

    The service's login can't write to a search's experiment.
    """
    with server_with_logins(tmp_path) as server:
        made = logins(server.uri, tuning="first-of-tuning", serving="first-of-serving")
        assert made.returncode == 0 and made.stdout.splitlines() == [
            "tuning: made",
            "serving: made",
        ], made.stderr
        registry = Registry(server.uri, cache_dir=tmp_path / "cache")

        become(monkeypatch, "tuning", "first-of-tuning")
        with registry.start_search("sms-spam", {"trials": 1}, {}) as search:
            search.parent_metrics({"accuracy": 0.5})
        become(monkeypatch, "serving", "first-of-serving")
        assert registry.live() == {}
        with pytest.raises(OrchestratorError), registry.start_search("sms-spam", {"trials": 1}, {}):
            pass
        again = logins(server.uri, tuning="second-of-tuning", serving="first-of-serving")
        assert again.returncode == 0 and "tuning: has its password" in again.stdout, again.stderr
        become(monkeypatch, "tuning", "second-of-tuning")
        assert registry.live() == {}
        become(monkeypatch, "tuning", "first-of-tuning")
        with pytest.raises(OrchestratorError):
            registry.live()


@pytest.mark.long
@pytest.mark.slow
def test_a_login_that_may_not_finish_a_search_is_refused_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check covers all rights that the end of a search needs.

    These are registering under another login's model, moving its aliases, and writing the aliases'
    history.
    """
    with server_with_logins(tmp_path) as server:
        assert (
            logins(server.uri, tuning="first-of-tuning", serving="first-of-serving").returncode == 0
        )
        registry = Registry(server.uri, cache_dir=tmp_path / "cache")
        become(monkeypatch, "tuning", "first-of-tuning")
        registry.check_search_end("spam", "spam")
        with registry.start_search("spam", {"trials": 1}, {}) as search:
            run_id = search.run_id
        artifact = PromptArtifact(PROMPT, manifest()).save(tmp_path / "prompt")
        registry.auto_alias("spam", registry.register(artifact, "spam", run_id))
        registry.check_search_end("spam", "spam")
        become(monkeypatch, "serving", "first-of-serving")
        with pytest.raises(
            BadInput,
            match=r"writing to the experiment orchestrator-aliases.*does not let this login",
        ) as refused:
            registry.check_search_end("other", "other")
        assert "ask for the permission" in refused.value.hint
        client = admin(monkeypatch, server.uri)
        history = registry._store.client.get_experiment_by_name("orchestrator-aliases")
        assert history is not None
        client.grant_user_permission("serving", "experiment", history.experiment_id, "EDIT")
        become(monkeypatch, "serving", "first-of-serving")
        registry.check_search_end("other", "other")
        with pytest.raises(BadInput, match=r"spam can be registered.*does not let this login"):
            registry.check_search_end("other", "spam")


def admin(patch: pytest.MonkeyPatch, uri: str) -> Any:
    """Return MLflow's permissions client, logged in as the administrator."""
    from mlflow.server import get_app_client

    become(patch, "admin", "the-admin-password")
    return get_app_client("basic-auth", uri)
