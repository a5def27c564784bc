"""Searches that fail at the end keep their results, and `resume` registers them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from small_jobs import Recorder, write_job

from orchestrator.errors import BadInput
from orchestrator.job.yaml import load_job
from orchestrator.registry import Registry
from orchestrator.search.resume import resume_search
from orchestrator.search.run import run_job
from orchestrator.search.state.saved import find_search
from orchestrator.tuning.reports import Report

pytestmark = pytest.mark.ray
HISTORY = "orchestrator-aliases"


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("later")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_job(
            folder, search__scheduler="fifo", search__trials=1, search__few_shot=0, train__steps=4,
            search__space={"init": "random", "num_virtual_tokens": 2, "learning_rate": 0.1},
        )  # fmt: skip
        yield folder


def in_trash(action: Callable[[mlflow.MlflowClient, str], Any]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    action(client, client.get_experiment_by_name(HISTORY).experiment_id)


def delete_history(report: Report) -> None:
    if report.step == 4:  # the search's one trial is over
        in_trash(lambda client, experiment: client.delete_experiment(experiment))


def test_a_search_that_could_not_register_does_so_later(folder: Path) -> None:
    """A failed registration is made up for by `resume`.

    This holds for a new model, and for a version that exists while its aliases could not be moved.

    The test deletes the history of aliases while the search runs. The message names the remedy,
    then `resume`. Resume first fails for the same reason, then registers one version with its
    aliases; a second resume changes nothing.
    """
    registry = Registry()
    for round_, versions in enumerate(([1], [2, 1])):
        job = load_job(folder / "job.yaml")
        with pytest.raises(BadInput, match=HISTORY) as ended:
            run_job(job, Recorder(job, delete_history))
        search = find_search("latest").id
        assert "mlflow experiments restore --experiment-id" in ended.value.hint
        assert f"then orchestrator resume {search}" in ended.value.hint
        if round_:  # the version is there, without an alias
            assert registry.versions("tiny")[0].aliases == ()
        with pytest.raises(BadInput, match=HISTORY):
            resume_search(search, lambda job: Recorder(job))
        in_trash(lambda client, experiment: client.restore_experiment(experiment))
        document, _ = resume_search(search, lambda job: Recorder(job))
        assert document["model"]["version"] == versions[0]
        assert [version.version for version in registry.versions("tiny")] == versions
        assert registry.aliases("tiny")["challenger"] == versions[0]
        again, _ = resume_search(search, lambda job: Recorder(job))
        assert again == document
    challengers = [move for move in registry.history("tiny") if move.alias == "challenger"]
    assert [move.new for move in challengers] == [1, 2]
