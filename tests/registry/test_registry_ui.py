"""MLflow's pages as ``orchestrator ui`` starts them, in a real browser without a window."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.registry import Registry

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,900",
    "--timeout=40000", "--virtual-time-budget=30000",  # the pages fetch most of what they show
]  # fmt: skip
LIMIT_S = 90.0  # only a hang takes this long
INITS = ("random", "sample_vocab", "class_labels")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium here; on Debian: apt-get install chromium"),
]


@pytest.fixture
def pages(local: Registry) -> Iterator[str]:
    """Address of ``orchestrator ui`` on the store, a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "orchestrator", "ui", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": local.tracking_uri}
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert answers(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the server's own session, with its workers
        process.wait()


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server is up in time."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return True
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    return False


def text_of(address: str, picture: str, profile: Path) -> str:
    """The text of a page once its scripts have run; a screenshot of it is kept in build/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"{picture}.png"
    file.unlink(missing_ok=True)
    argv = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={file}", "--dump-dom", address]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert file.read_bytes().startswith(b"\x89PNG")
    words = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    return " ".join(html.unescape(words).split())


@pytest.fixture
def parent(local: Registry, name: str, make_artifact: Callable[..., Path]) -> str:
    """The run of a search with three trials, the best of which is registered as champion."""
    with local.start_search(name, {"trials": 3}, {}) as search:
        for number, init in enumerate(INITS):
            trial = f"t{number:03d}"
            search.trial_started(trial, {"init": init, "num_virtual_tokens": 20, "learning_rate": 0.1, "seed": 0})
            search.trial_metrics(trial, 10, {"validation_accuracy": 0.5 + number / 10})
            search.trial_ended(trial, "finished")
        assert search.flush(10)
        version = local.register(make_artifact(), name, search.run_ids["t002"])
    assert local.auto_alias(name, version).alias == "champion"
    return search.run_id


def test_the_pages_show_a_search_and_its_version(
    pages: str, parent: str, local: Registry, name: str, tmp_path: Path
) -> None:
    """The runs page folds a search's trials under its run and lists them all when sorted by a metric; the model's page
    has the version and its alias."""
    run = local._store.client.get_run(parent)
    runs_page = f"{pages}/#/experiments/{run.info.experiment_id}/runs"
    children = [f"{init}, 20 tokens, lr 0.1, seed 0" for init in INITS]
    folded = text_of(runs_page, "runs-folded", tmp_path)
    assert run.info.run_name in folded and "4 matching runs" in folded
    assert [child for child in children if child in folded] == []
    by_metric = f"{runs_page}?orderByKey=metrics.%60validation_accuracy%60&orderByAsc=false"
    listed = text_of(by_metric, "runs", tmp_path)
    assert [it for it in (run.info.run_name, *children) if it not in listed] == []
    assert listed.index(children[2]) < listed.index(children[1]) < listed.index(children[0])
    model_page = text_of(f"{pages}/#/models/{name}", "model", tmp_path)
    assert name in model_page and "Version 1" in model_page and "@ champion" in model_page
