"""A whole search that confirms its best configurations, interrupted there and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import Recorder, run_search, search_runs, write_job

from orchestrator.job.spec import JobSpec
from orchestrator.search.resume import resume_search
from tests.test_resume import found, interrupt_at

CHANGES = {
    "search__trials": 4,
    "search__confirm": 2,
    "search__confirm_seeds": 2,
    "train__steps": 8,
    "resources__trials_per_worker": 2,
}


def test_a_search_interrupted_in_its_confirmation_ends_as_an_undisturbed_one(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two best of four configurations are trained again under two seeds, to the last step.

    The search is interrupted in the second round of the fresh runs, and goes on there: the trials
    of the search do not train again, and the result is the same to the last digit.
    """
    monkeypatch.chdir(tmp_path)
    job_file = write_job(tmp_path, **CHANGES)
    interrupt_at(job_file, "t004", 8)
    recorders: list[Recorder] = []

    def progress(job: JobSpec) -> Recorder:
        recorders.append(Recorder(job))
        return recorders[0]

    document, _ = resume_search("latest", progress)
    assert set(recorders[0].reports) == {"t004", "t005", "t006", "t007"}
    assert [report.step for report in recorders[0].reports["t004"]] == [8]
    confirmed = document["confirmed"]
    assert [len(one["runs"]) for one in confirmed] == [2, 2]
    assert document["best"]["trial"] == confirmed[0]["best_run"]
    assert [trial["steps"] for trial in document["trials"][4:]] == [8, 8, 8, 8]
    tags = [run.data.tags for run in search_runs(f"sqlite:///{tmp_path}/mlflow.db")]
    assert sum("orchestrator.confirms" in one for one in tags) == 4
    assert sum("orchestrator.confirmed" in one for one in tags) == 1

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    monkeypatch.chdir(undisturbed)
    other = run_search(job_file).document
    assert found(document) == found(other)
    assert confirmed == other["confirmed"]
