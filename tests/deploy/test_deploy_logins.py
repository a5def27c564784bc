"""deploy/mlflow/logins.py against a real server with logins, started by start.sh: who may do what afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_server import Server

from orchestrator.errors import OrchestratorError
from orchestrator.registry import Registry
from tests.deploy.manifests import DEPLOY

SCRIPT = DEPLOY / "mlflow" / "logins.py"


def logins(uri: str, **passwords: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": "the-admin-password",
        **{f"LOGIN_{name.upper()}": password for name, password in passwords.items()},
    }  # fmt: skip
    argv = [sys.executable, SCRIPT, "tuning", "serving"]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_it_says_what_is_missing() -> None:
    """Before it asks anybody."""
    done = logins("http://127.0.0.1:1", tuning="x")
    assert done.returncode == 2 and "LOGIN_SERVING" in done.stderr and "LOGIN_TUNING" not in done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_searches_write_and_the_service_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both logins work, the service's can't write to a search's experiment, and a new password takes the old one's
    place."""
    server = Server(tmp_path)
    settings = {
        "DATA": str(tmp_path / "data"), "POSTGRES_URI": f"sqlite:///{tmp_path}/mlflow.db", "PORT": str(server.port),
        "WORKERS": "1", "PYTHON": sys.executable, "MLFLOW_AUTH_ADMIN_PASSWORD": "the-admin-password",
    }  # fmt: skip
    with (tmp_path / "server.log").open("ab") as log:
        server.process = subprocess.Popen(
            [DEPLOY / "mlflow" / "start.sh"], env=os.environ | settings, cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        server.await_answer()
        made = logins(server.uri, tuning="first-of-tuning", serving="first-of-serving")
        assert made.returncode == 0 and made.stdout.splitlines() == ["tuning: made", "serving: made"], made.stderr
        registry = Registry(server.uri, cache_dir=tmp_path / "cache")

        def become(name: str, password: str) -> None:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

        become("tuning", "first-of-tuning")
        with registry.start_search("sms-spam", {"trials": 1}, {}) as search:
            search.parent_metrics({"accuracy": 0.5})
        become("serving", "first-of-serving")
        assert registry.live() == {}
        with pytest.raises(OrchestratorError), registry.start_search("sms-spam", {"trials": 1}, {}):
            pass
        again = logins(server.uri, tuning="second-of-tuning", serving="first-of-serving")
        assert again.returncode == 0 and "tuning: has its password" in again.stdout, again.stderr
        become("tuning", "second-of-tuning")
        assert registry.live() == {}
        become("tuning", "first-of-tuning")
        with pytest.raises(OrchestratorError):
            registry.live()
    finally:
        server.stop()
