"""``orchestrator doctor`` reports what is present, what is missing and the fix."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from small_jobs import Command

from orchestrator.cli import doctor
from orchestrator.cli.doctor import CheckResult


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def test_a_sound_machine(command: Command, store: str) -> None:
    """Every part is listed with its state; the next step is the demo or an own job."""
    said = command("doctor")
    assert said.code == 0, said.out
    for what in (
        "python",
        "torch",
        "ray",
        "mlflow",
        "cpu",
        "accelerator",
        "disk",
        "Ray",
        "registry",
        "searches",
        "hub",
    ):
        assert f"ok  {what}: " in said.out, said.out
    assert store in said.out and "HF_HUB_OFFLINE" in said.out
    assert said.out.splitlines()[-1] == "next: orchestrator demo   or   orchestrator init"
    assert all(finding["ok"] for finding in command("doctor", "--json").document)


def test_what_does_not_answer_is_a_finding(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable registry and cluster are reported with a fix.

    The exit code says that something is unreachable.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        said = command("doctor")
    assert said.code == 3
    broken = [line for line in said.out.splitlines() if line.startswith("FIX ")]
    assert len(broken) == 2 and all(str(port) in line for line in broken)
    assert "mlflow server" in said.out and "RAY_ADDRESS" in said.out
    assert "orchestrator demo" not in said.out


def test_a_full_disk_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both findings name a fix."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e8))
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    found = {finding.what: finding for finding in doctor.examine()}
    assert not found["disk"].ok and "free 2 GB" in found["disk"].fix
    assert not found["no-such-library"].ok and found["no-such-library"].fix == doctor.INSTALL_AGAIN


def test_a_check_that_breaks_is_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One broken library does not hide the other checks."""

    def _device() -> list[CheckResult]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_device", _device)
    found = {finding.what: finding for finding in doctor.examine()}
    assert not found["device"].ok and "libcudart" in found["device"].found
    assert found["hub"].ok
