"""Workarounds: each has a row in docs/workarounds.md, and its tests fail without it."""

from __future__ import annotations

import ast
import ctypes
import logging
import os
import re
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from packaging.requirements import Requirement
from packaging.version import Version

from orchestrator.cluster.ray_internals import train as train_internals
from orchestrator.cluster.ray_internals.core import HANDLERS_INSTALLED, no_signal_handlers
from orchestrator.cluster.ray_internals.jobs import job_client
from orchestrator.cluster.ray_internals.settings import (
    NICENESS,
    PRELOADED,
    SEARCH,
    SERVING,
    quiet_job_loggers,
    quiet_search_loggers,
    quiet_serve_logger,
    worker_niceness,
)
from orchestrator.errors import Unreachable
from orchestrator.registry.mlflow_internals.settings import ENVIRONMENT
from orchestrator.serving import app
from orchestrator.serving.deploy.options import ServeOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "workarounds.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w/.]+\.py)` `(\w+)` \|.*\|([^|]*)\|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
CHECKED = re.compile(r"^## (\w+) (\d+\.\d+)$", re.MULTILINE)
LIBRARIES = {"Ray": "ray", "MLflow": "mlflow"}
IN_PYTHON = re.compile(r"^(RAY_(?!preload|USAGE)|TUNE_)")


@lru_cache
def functions(file: Path) -> frozenset[str]:
    """Return the functions of a module."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def rows(page: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return the file, the name and the tests of each workaround on the page."""
    return [(file, name, TEST.findall(tests)) for file, name, tests in ROW.findall(page)]


def missing(page: str) -> list[str]:
    """List the workarounds and tests of the page that are not in the code."""
    workarounds = [(ROOT / "orchestrator" / file, name) for file, name, _ in rows(page)]
    tests = [(ROOT / file, name) for _, _, tests in rows(page) for file, name in tests]
    gone = [(file, name) for file, name in tests if name not in functions(file)]
    gone += [
        (file, name)
        for file, name in workarounds
        if not re.search(rf"\b{name}\b", file.read_text(encoding="utf-8"))
    ]
    return [f"{file}: {name}" for file, name in gone]


def public(file: Path) -> set[str]:
    """Return the functions and classes of a module, without what only serves one of them."""
    defined = {
        node.name: node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    called = {
        inner.id
        for name, node in defined.items()
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and inner.id in defined and inner.id != name
    }
    return set(defined) - called


def test_every_workaround_and_its_tests_are_there() -> None:
    """Each row names a workaround in the package and at least one test; all of them exist."""
    assert len(rows(PAGE)) == PAGE.count("\n| `")
    assert all(tests for _, _, tests in rows(PAGE))
    assert missing(PAGE) == []


@pytest.mark.parametrize("fence", ["cluster/ray_internals", "registry/mlflow_internals"])
def test_everything_behind_a_fence_has_a_row(fence: str) -> None:
    """A function or class of these packages that others call is on the page."""
    package = ROOT / "orchestrator" / fence
    there = {
        (str(file.relative_to(ROOT / "orchestrator")), name)
        for file in package.glob("*.py")
        for name in public(file)
    }
    assert there - {(file, name) for file, name, _ in rows(PAGE)} == set()


def test_a_test_of_another_name_would_be_noticed() -> None:
    assert missing(PAGE.replace("::test_", "::tests_", 1))
    assert missing(PAGE.replace("`plain_trials`", "`plainer_trials`"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_page_names_the_version_here(library: str) -> None:
    """A new version of the library means that its workarounds must be checked again."""
    checked = dict(CHECKED.findall(PAGE))[library]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (version,) = (
        next(iter(Requirement(line).specifier)).version
        for line in pinned
        if line.startswith(f"{LIBRARIES[library]}==")
    )
    assert Version(version).release[:2] == Version(checked).release


@pytest.fixture(scope="module")
def of_ray() -> str:
    """The text of all Python files of the installed Ray."""
    folder = Path(ray.__file__).parent
    return "\n".join(
        file.read_text(encoding="utf-8", errors="replace")
        for part in ("_common", "_private", "air", "serve", "train", "tune")
        for file in (folder / part).rglob("*.py")
    )


@pytest.mark.parametrize("name", [name for name in SEARCH | SERVING if IN_PYTHON.match(name)])
def test_ray_reads_the_setting(name: str, of_ray: str) -> None:
    """Ray ignores a variable that it does not know, so a renamed one would do nothing."""
    assert f'"{name}"' in of_ray


def test_ray_s_core_reads_the_modules_to_preload() -> None:
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert PRELOADED.removeprefix("RAY_").encode() in raylet.read_bytes()


def test_ray_s_core_has_the_flag_of_its_signal_handlers() -> None:
    flag = ctypes.c_bool.in_dll(ctypes.CDLL(ray._raylet.__file__), HANDLERS_INSTALLED)
    before = flag.value
    with no_signal_handlers():
        assert flag.value
    assert not flag.value
    flag.value = before


def test_ray_s_core_reads_the_niceness() -> None:
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert NICENESS.removeprefix("RAY_").encode() in raylet.read_bytes()


def test_the_niceness_is_set_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken back, so that another search may have another; the user's value is kept."""
    monkeypatch.delenv(NICENESS, raising=False)
    with worker_niceness(7):
        assert os.environ[NICENESS] == "7"
    assert NICENESS not in os.environ
    monkeypatch.setenv(NICENESS, "12")
    with worker_niceness(7):
        assert os.environ[NICENESS] == "12"
    assert os.environ[NICENESS] == "12"


def test_train_starts_no_process_that_a_search_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three helpers of Train are left out of what its controller gets, and all else is there."""
    from ray.train import RunConfig, ScalingConfig

    given: dict[str, Any] = {}

    def controller(plain: bool, **parts: Any) -> None:
        given.update(parts)
        raise train_internals.GivenUp

    monkeypatch.setattr(train_internals, "make_controller", controller)
    trainer = train_internals.LeanTrainer(
        lambda: None,
        plain=True,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="lean", storage_path=str(tmp_path)),
    )
    usual = {type(each).__name__ for each in trainer._create_default_callbacks()}
    with pytest.raises(train_internals.GivenUp):
        trainer.fit()
    left_out = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert left_out < usual
    assert {type(each).__name__ for each in given["callbacks"]} == usual - left_out
    policy = given["scaling_policy"]
    policy.after_controller_start(None)  # would start the actor that announces requests
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    assert policy._coordinator_client is None


def test_tune_and_train_log_nothing_that_we_say_ourselves() -> None:
    """Tune's tracebacks and Train's warnings stay out of a search's output."""
    from ray.train.v2._internal.execution.controller import controller
    from ray.tune.execution import tune_controller

    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [logger.level for logger in loggers]
    try:
        quiet_search_loggers()
        assert not tune_controller.logger.isEnabledFor(logging.ERROR)
        assert not controller.logger.isEnabledFor(logging.WARNING)
        assert controller.logger.isEnabledFor(logging.ERROR)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_serve_and_the_job_client_log_nothing_below_warnings() -> None:
    """Serve logs each step of a deployment, and the job client each file of a package."""
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    loggers = [logging.getLogger("ray.serve"), dashboard_sdk.logger, sdk.logger]
    before = [logger.level for logger in loggers]
    try:
        quiet_serve_logger()
        quiet_job_loggers()
        assert [logger.getEffectiveLevel() for logger in loggers] == 3 * [logging.WARNING]
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_a_job_server_that_falls_silent_is_not_waited_for() -> None:
    """Ray's own client has no time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises((requests.exceptions.RequestException, ConnectionError)):
            job_client(url, None, (1.0, 1.0))


def test_a_server_s_ray_asks_its_proxies_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are in the environment when Ray starts, whose processes inherit it."""
    there: dict[str, str] = {}

    def start(**_: Any) -> None:
        there.update(os.environ)
        raise ConnectionError("no Ray today")

    for name in (*SERVING, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Unreachable, match="no Ray today"):
        app._connect_ray(ServeOptions())
    assert SERVING.items() <= there.items()


def run(code: str, **environment: str) -> str:
    """Run the code in a Python of its own and return what it prints."""
    mine = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=mine | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_threads_that_wait_sleep_unless_the_user_says_otherwise() -> None:
    """OpenMP reads the variable when torch is imported, so the package sets it before."""
    code = "import orchestrator, os; print(os.environ['OMP_WAIT_POLICY'])"
    assert run(code) == "PASSIVE"
    assert run(code, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


COLLECTIONS = """
import gc
from orchestrator.registry.store import import_mlflow
begun = []
gc.callbacks.append(lambda phase, info: begun.append(phase))
import_mlflow()
del gc.callbacks[:]
print(begun.count("start") < 5, gc.isenabled())
"""


def test_mlflow_is_imported_without_a_collection() -> None:
    """Python would search for garbage about 400 times; now it does so once, afterwards."""
    assert run(COLLECTIONS) == "True True"


DEFAULTS = """
from orchestrator.registry.store import import_mlflow
import_mlflow()
from mlflow import environment_variables as known
print(known.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), known.MLFLOW_HTTP_REQUEST_TIMEOUT.get())
"""


def test_mlflow_knows_our_defaults() -> None:
    """MLflow has our values where the user has set none, and knows every name."""
    from mlflow import environment_variables

    assert run(DEFAULTS) == "2 15"
    assert run(DEFAULTS, MLFLOW_HTTP_REQUEST_TIMEOUT="40") == "2 40"
    assert [name for name in ENVIRONMENT if not hasattr(environment_variables, name)] == []


LOGGERS = """
import logging
from orchestrator.registry.store import import_mlflow
import_mlflow()
import mlflow.store.db.utils
names = ("mlflow", "mlflow.store.db.utils", "alembic.runtime.migration", "urllib3.connectionpool")
print(*(logging.getLevelName(logging.getLogger(name).getEffectiveLevel()) for name in names))
"""


def test_mlflow_logs_only_what_no_error_says() -> None:
    """Its own level wins where the user has set one."""
    assert run(LOGGERS) == "ERROR CRITICAL WARNING ERROR"
    assert run(LOGGERS, MLFLOW_LOGGING_LEVEL="INFO").startswith("INFO ")
