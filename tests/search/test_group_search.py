"""Searches whose workers train in groups have the results of a search with one worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray_state import actors
from small_jobs import Finished, close, run_search, write_job

from orchestrator.tuning.reports import Report

# SGD updates in proportion to gradients; the first AdamW updates amplify rounding near zero.
CHANGES = {
    "search__trials": 4,
    "search__scheduler": "fifo",
    "train__optimizer": "sgd",
    "train__steps": 8,
    "registry__register_top": 0,
}
PAIR = {**CHANGES, "resources__workers_per_group": 2}

pytestmark = pytest.mark.long


def searched(
    folder: Path, on_report: Callable[[Report], None] | None = None, **changes: Any
) -> Finished:
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_search(write_job(folder, **changes), on_report)


@pytest.fixture(scope="module")
def one_worker(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return searched(tmp_path_factory.mktemp("one") / "search", **CHANGES)


def assert_same(found: Finished, wanted: Finished) -> None:
    for name in ("trials", "best", "baselines"):
        assert close(found.document[name], wanted.document[name])
    assert found.left_behind == set()


def test_two_workers_search_as_one(one_worker: Finished, tmp_path: Path) -> None:
    """Trials, baselines and the test split have the same metrics as with one worker."""
    assert_same(searched(tmp_path / "search", **PAIR), one_worker)


def test_a_sharded_backbone_searches_as_a_whole_one(one_worker: Finished, tmp_path: Path) -> None:
    """sharding: fsdp gives the same result, from the job's file to the outcome."""
    assert_same(searched(tmp_path / "search", **PAIR, resources__sharding="fsdp"), one_worker)


@pytest.mark.failure
def test_a_search_survives_the_death_of_one_of_a_group(
    one_worker: Finished, tmp_path: Path
) -> None:
    """After SIGKILL of one of two workers the group starts again and ends as if undisturbed."""
    killed: list[int] = []

    def kill_once(report: Report) -> None:
        if report.step == 4 and not killed:
            pids = sorted(worker["Pid"] for worker in actors("RayTrainWorker").values())
            assert len(pids) == 2
            killed.append(pids[-1])
            os.kill(killed[0], signal.SIGKILL)

    assert_same(searched(tmp_path / "search", kill_once, **PAIR), one_worker)
    assert killed
