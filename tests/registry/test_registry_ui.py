"""MLflow's pages as ``orchestrator ui`` starts them, in a headless browser."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser import check_pages, mlflow_pages, needs_browser, read_page, text_of
from mlflow import MlflowClient
from small_jobs import Finished, search_runs

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry
from orchestrator.search.report.facts import SearchFacts
from orchestrator.search.report.figures import FIGURES, draw
from orchestrator.search.report.page import page
from orchestrator.search.state.trials import TrialRecord, TrialStatus

INITS = ("random", "sample_vocab", "class_labels")

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture
def pages(local: Registry) -> Iterator[str]:
    """The address of ``orchestrator ui`` on the store."""
    with mlflow_pages(local.tracking_uri) as url:
        yield url


@pytest.fixture
def parent(local: Registry, name: str, make_artifact: Callable[..., Path], report: Report) -> str:
    """The run of a search with three trials and a report, whose best trial is champion."""
    with local.start_search(
        name, {"trials": 3, "method": "prompt_tuning"}, {"device_hours": "0.01"}
    ) as search:
        for number, init in enumerate(INITS):
            trial = f"t{number:03d}"
            search.trial_started(
                trial, {"init": init, "num_virtual_tokens": 20, "learning_rate": 0.1, "seed": 0}
            )
            search.trial_metrics(trial, 10, {"validation_accuracy": 0.5 + number / 10})
            search.trial_ended(trial, "finished")
        assert search.flush(10)
        search.parent_metrics({"best_test_accuracy": 0.9})
        near = [[(" good", 0.11), (" great", 0.12)]] * 5
        version = local.register(
            make_artifact(), name, search.run_ids["t002"], metric="accuracy", nearest=near
        )
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
    """A report with inits, lengths, seeds, learning rates and a failed trial."""
    job = JobSpec.model_validate(
        {
            "name": "everything",
            "base_model": {"id": "builtin:quickstart"},
            "data": {
                "path": "builtin:quickstart",
                "template": "{text}",
                "target": "label",
                "verbalizer": {0: "a", 1: "b"},
            },
        }
    )
    trials = []
    for number, (init, tokens, seed) in enumerate(itertools.product(INITS, (5, 20), (0, 1))):
        rate = 0.01 * 1.4**number
        points = [
            (step, {"accuracy": 0.5 + 0.03 * number * step / 90, "loss": 1.0})
            for step in (30, 60, 90)
        ]
        status = TrialStatus.STOPPED if number % 2 else TrialStatus.FINISHED
        if number == 3:
            status = TrialStatus.FAILED
        spec = TrialSpec(init, None, tokens, rate, seed)
        trials.append(
            TrialRecord(
                f"t{number:03}", spec, status, step=90, metrics=points[-1][1], points=points
            )
        )
    found = {split: {"accuracy": 0.5, "loss": 2.0} for split in ("validation", "test")}
    confusion = {"labels": [0, 1], "counts": [[40, 10], [5, 45]]}
    result = {
        "best": {"trial": "t011", "metrics": found, "confusion": confusion},
        "model": None,
        "seconds": {"total": 90.0, "ray": 8.0, "trials": 70.0, "registry": 2.0},
        "plan": {"seconds": {"total": 80.0}},
    }
    facts = SearchFacts("everything-1", job, "0" * 32, trials, {"zero_shot": found}, result)
    pictures = draw(facts)
    return Report(page(facts, pictures), pictures)


def test_the_pages_show_a_search_and_its_version(
    pages: str, parent: str, local: Registry, name: str, tmp_path: Path
) -> None:
    """The runs page folds trials under their search, and lists all if sorted by a metric.

    The model's page has the version and its alias.
    """
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
    # The search's page, charts and artifacts, then the pages of the model and its version.
    run_page = f"{pages}/#/experiments/{run.info.experiment_id}/runs/{parent}"
    model_page = f"{pages}/#/models/{name}"
    shown = {
        "run": (run_page, ["best_test_accuracy", "prompt_tuning", "device_hours"]),
        "run-charts": (f"{run_page}/model-metrics", ["best_test_accuracy"]),
        "run-artifacts": (f"{run_page}/artifacts", ["report.html", "figures"]),
        "model": (model_page, [name, "Version 1", "@ champion"]),
        "version": (
            f"{model_page}/versions/1",
            [
                "champion",
                "this prompt",
                "zero shot",
                "Nearest words of the vocabulary",
                f"orchestrator query {name}",
            ],
        ),
    }
    check_pages(shown, tmp_path)


def test_the_pages_show_a_search_that_trained(finished: Finished, tmp_path: Path) -> None:
    """The pages show a finished search to somebody who comes back to it.

    They show all trials by outcome, the search and its charts, the best trial and its curve, the
    artifacts, and the version with its alias.
    """
    store = MlflowClient(finished.tracking_uri)
    parent = store.get_run(finished.document["mlflow"]["run_id"])
    runs = [
        run for run in search_runs(finished.tracking_uri) if run.info.run_id != parent.info.run_id
    ]
    best = next(
        run
        for run in runs
        if run.data.tags["orchestrator.trial"] == finished.document["best"]["trial"]
    )
    test_loss = parent.data.metrics["best_test_loss"]
    with mlflow_pages(finished.tracking_uri) as pages:
        experiment = f"{pages}/#/experiments/{parent.info.experiment_id}"
        by_metric = "orderByKey=metrics.%60validation_loss%60&orderByAsc=true"
        version = f"{pages}/#/models/tiny/versions/{finished.document['model']['version']}"
        nested = [run.info.run_name or "" for run in (parent, *runs)]
        shown = {
            "search-runs": (
                f"{experiment}/runs?{by_metric}",
                [*nested, "9 matching runs", "tuning"],
            ),
            "search-charts": (
                f"{experiment}/runs?{by_metric}&compareRunsMode=CHART",
                ["validation_loss"],
            ),
            "search": (
                f"{experiment}/runs/{parent.info.run_id}",
                ["best_test_loss", f"{test_loss:.4f}"[:5], "asha"],
            ),
            "search-artifacts": (
                f"{experiment}/runs/{parent.info.run_id}/artifacts",
                ["report.html", "figures"],
            ),
            "search-best": (
                f"{experiment}/runs/{best.info.run_id}",
                ["learning_rate", best.info.run_name or ""],
            ),
            "search-best-curve": (
                f"{experiment}/runs/{best.info.run_id}/model-metrics",
                ["train_loss"],
            ),
            "search-model": (f"{pages}/#/models/tiny", ["Version 1", "@ champion"]),
            "search-version": (
                version,
                [
                    "champion",
                    "this prompt",
                    "zero shot",
                    "Nearest words",
                    "orchestrator query tiny",
                ],
            ),
        }
        check_pages(shown, tmp_path)


WIDTHS = {"wide": "1400,2400", "narrow": "390,5000"}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_opens_without_a_network(report: Report, tmp_path: Path, width: str) -> None:
    """Every picture loads at a readable size, and nothing is wider than the window."""
    file = tmp_path / "report.html"
    probe = """<script>onload=()=>{const i=[...document.images];document.title=[i.length,
      i.filter(x=>x.complete&&x.naturalWidth>200&&x.clientWidth>250).length,
      document.documentElement.scrollWidth<=innerWidth].join(" ")}</script>"""
    file.write_text(report.page.replace("</body>", f"{probe}</body>"))
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={WIDTHS[width]}"]
    text, title = read_page(file.as_uri(), f"report-{width}", tmp_path, offline)
    assert "Search everything-1" in text and "t003" in text
    assert title == f"{len(FIGURES)} {len(FIGURES)} true"
