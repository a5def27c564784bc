"""MLflow's pages as ``orchestrator ui`` starts them, in a real browser without a window."""

from __future__ import annotations

import html
import itertools
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.registry import Registry
from orchestrator.report.facts import SearchFacts, TrialFacts
from orchestrator.report.figures import FIGURES, draw
from orchestrator.report.page import page
from orchestrator.space import TrialSpec
from orchestrator.spec import JobSpec

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,900",
    "--timeout=40000", "--virtual-time-budget=30000",  # the pages fetch most of what they show
]  # fmt: skip
LIMIT_S = 90.0  # only a hang takes this long
LOADS = 3
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


def text_of(address: str, picture: str, profile: Path, wanted: Sequence[str] = ()) -> str:
    """The text of a page once its scripts have run; a screenshot of it is kept in build/screenshots. On a busy machine
    the browser's own limit may end before the page has fetched what is ``wanted``: it is then opened again."""
    for _ in range(LOADS):
        text = read_page(address, picture, profile)[0]
        if all(word in text for word in wanted):
            break
    return text


def read_page(address: str, picture: str, profile: Path, more: Sequence[str] = ()) -> tuple[str, str]:
    """Text and title."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"{picture}.png"
    file.unlink(missing_ok=True)
    argv = [BROWSER, *FLAGS, *more, f"--user-data-dir={profile}", f"--screenshot={file}", "--dump-dom", address]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert file.read_bytes().startswith(b"\x89PNG")
    words = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    return " ".join(html.unescape(words).split()), title[1] if title else ""


@pytest.fixture
def parent(local: Registry, name: str, make_artifact: Callable[..., Path], report: Report) -> str:
    """The run of a search with three trials and its report, the best of which is registered as champion."""
    with local.start_search(name, {"trials": 3, "method": "prompt_tuning"}, {"device_hours": "0.01"}) as search:
        for number, init in enumerate(INITS):
            trial = f"t{number:03d}"
            search.trial_started(trial, {"init": init, "num_virtual_tokens": 20, "learning_rate": 0.1, "seed": 0})
            search.trial_metrics(trial, 10, {"validation_accuracy": 0.5 + number / 10})
            search.trial_ended(trial, "finished")
        assert search.flush(10)
        search.parent_metrics({"best_test_accuracy": 0.9})
        near = [[(" good", 0.11), (" great", 0.12)]] * 5
        version = local.register(make_artifact(), name, search.run_ids["t002"], metric="accuracy", nearest=near)
    assert local.auto_alias(name, version).alias == "champion"
    pictures = {f"figures/{name}.svg": svg for name, svg in report.pictures.items()}
    local.log_files(search.run_id, {"report.html": report.page.encode(), **pictures})
    return search.run_id


class Report(NamedTuple):
    """A search's page and its pictures."""

    page: str
    pictures: dict[str, bytes]


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a search with everything there is to see: inits, lengths, seeds, learning rates, a failed trial."""
    job = JobSpec.model_validate(
        {
            "name": "everything", "base_model": {"id": "builtin:quickstart"},
            "data": {
                "path": "builtin:quickstart", "template": "{text}", "target": "label", "verbalizer": {0: "a", 1: "b"},
            },
        }
    )  # fmt: skip
    trials = []
    for number, (init, tokens, seed) in enumerate(itertools.product(INITS, (5, 20), (0, 1))):
        rate = 0.01 * 1.4**number
        points = [(step, {"accuracy": 0.5 + 0.03 * number * step / 90, "loss": 1.0}) for step in (30, 60, 90)]
        status = "failed" if number == 3 else "stopped" if number % 2 else "finished"
        spec = TrialSpec(init, None, tokens, rate, seed)
        trials.append(TrialFacts(f"t{number:03}", spec, status, points, points[-1][1]))
    found = {split: {"accuracy": 0.5, "loss": 2.0} for split in ("validation", "test")}
    confusion = {"labels": [0, 1], "counts": [[40, 10], [5, 45]]}
    result = {
        "best": {"trial": "t011", "metrics": found, "confusion": confusion}, "model": None,
        "seconds": {"total": 90.0, "ray": 8.0, "trials": 70.0, "registry": 2.0}, "plan": {"seconds": {"total": 80.0}},
    }  # fmt: skip
    facts = SearchFacts("everything-1", job, "0" * 32, trials, {"zero_shot": found}, result)
    pictures = draw(facts)
    return Report(page(facts, pictures), pictures)


def test_the_pages_show_a_search_and_its_version(
    pages: str, parent: str, local: Registry, name: str, tmp_path: Path
) -> None:
    """The runs page folds a search's trials under its run and lists them all when sorted by a metric; the model's page
    has the version and its alias."""
    run = local._store.client.get_run(parent)
    runs_page = f"{pages}/#/experiments/{run.info.experiment_id}/runs"
    children = [f"{init}, 20 tokens, lr 0.1, seed 0" for init in INITS]
    folded = text_of(runs_page, "runs-folded", tmp_path, [run.info.run_name, "4 matching runs"])
    assert run.info.run_name in folded and "4 matching runs" in folded
    assert [child for child in children if child in folded] == []
    by_metric = f"{runs_page}?orderByKey=metrics.%60validation_accuracy%60&orderByAsc=false"
    listed = text_of(by_metric, "runs", tmp_path, children)
    assert [it for it in (run.info.run_name, *children) if it not in listed] == []
    assert listed.index(children[2]) < listed.index(children[1]) < listed.index(children[0])
    # The search's own page: parameters, metrics, tags; its charts; its artifacts. Then the model's and the version's.
    run_page = f"{pages}/#/experiments/{run.info.experiment_id}/runs/{parent}"
    model_page = f"{pages}/#/models/{name}"
    shown = {
        "run": (run_page, ["best_test_accuracy", "prompt_tuning", "device_hours"]),
        "run-charts": (f"{run_page}/model-metrics", ["best_test_accuracy"]),
        "run-artifacts": (f"{run_page}/artifacts", ["report.html", "figures"]),
        "model": (model_page, [name, "Version 1", "@ champion"]),
        "version": (
            f"{model_page}/versions/1",
            ["champion", "this prompt", "zero shot", "Nearest words of the vocabulary", f"orchestrator query {name}"],
        ),
    }
    for picture, (address, wanted) in shown.items():
        text = text_of(address, picture, tmp_path, wanted)
        assert [it for it in wanted if it not in text] == [], picture


WIDTHS = {"wide": "1400,2400", "narrow": "390,5000"}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_opens_without_a_network(report: Report, tmp_path: Path, width: str) -> None:
    """Every picture is loaded at a size to read it by, and nothing is wider than the window."""
    file = tmp_path / "report.html"
    probe = """<script>onload=()=>{const i=[...document.images];document.title=[i.length,
      i.filter(x=>x.complete&&x.naturalWidth>200&&x.clientWidth>250).length,
      document.documentElement.scrollWidth<=innerWidth].join(" ")}</script>"""
    file.write_text(report.page.replace("</body>", f"{probe}</body>"))
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={WIDTHS[width]}"]
    text, title = read_page(file.as_uri(), f"report-{width}", tmp_path, offline)
    assert "Search everything-1" in text and "t003" in text
    assert title == f"{len(FIGURES)} {len(FIGURES)} true"
