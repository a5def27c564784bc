"""A search in MLflow: runs, states, metric histories, and outages of the server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.artifact import DataRecord
from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.registry import Registry
from orchestrator.registry.runs.entries import load_entries

CONFIG = {"init": {"text": "Classify."}, "num_virtual_tokens": 20, "learning_rate": 0.3, "seed": 1}


def run(registry: Registry, run_id: str) -> Any:
    return registry._store.client.get_run(run_id)


def history(registry: Registry, run_id: str, metric: str) -> list[tuple[int, float]]:
    points = registry._store.client.get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_a_search_is_a_parent_run_with_a_child_a_trial(registry: Registry, name: str) -> None:
    with registry.start_search(name, {"train.steps": 100}, {"job": "quickstart"}) as search:
        search.trial_started("t1", CONFIG)
        for step in (10, 20):
            search.trial_metrics("t1", step, {"validation_accuracy": step / 100, "loss": math.nan})
        search.trial_ended("t1", "finished")
        search.parent_metrics({"zero_shot_test_accuracy": 0.23})
        search.parent_tags({"best_trial": "t1"})
    parent, child = run(registry, search.run_id), run(registry, search.run_ids["t1"])
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.params == {"train.steps": "100"}
    assert parent.data.metrics == {"zero_shot_test_accuracy": 0.23}
    assert parent.data.tags["job"] == "quickstart" and parent.data.tags["best_trial"] == "t1"
    assert child.data.tags["mlflow.parentRunId"] == search.run_id
    assert child.info.run_name == "text 'Classify.', 20 tokens, lr 0.3, seed 1"
    assert child.data.params["init"] == '{"text": "Classify."}'
    assert history(registry, child.info.run_id, "validation_accuracy") == [(10, 0.1), (20, 0.2)]
    assert "loss" not in child.data.metrics
    assert child.data.tags["orchestrator.not_finite"] == "loss was nan at step 20"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("builtin:quickstart", "builtin:quickstart"),
        ('{"test": "data/sms/test.jsonl", "train": "data/sms/train.jsonl"}', "data/sms"),
        (
            '{"train": "train.jsonl", "test": "test.jsonl"}',
            '{"train": "train.jsonl", "test": "test.jsonl"}',
        ),
        ('{"train": "/data/a", "test": "b"}', '{"train": "/data/a", "test": "b"}'),
        ("{ö" * 300, "{ö" * 250),
    ],
)
def test_the_rows_are_an_input_of_the_search(
    registry: Registry, name: str, path: str, named: str
) -> None:
    """Runs are found by the name and the fingerprint of their rows.

    MLflow's pages have a column for them.
    """
    data = DataRecord(path=path, fingerprint="0123456789abcdef" * 4, rows={"train": 40, "test": 16})
    with registry.start_search(name, {}, {}, data=data) as search:
        pass
    (found,) = run(registry, search.run_id).inputs.dataset_inputs
    assert found.dataset.name == named and found.dataset.digest == data.fingerprint[:36]
    assert (
        json.loads(found.dataset.source)["path"] == path
        and json.loads(found.dataset.profile)["rows"] == data.rows
    )
    query = f"dataset.digest = '{found.dataset.digest}'"
    same = registry._store.client.search_runs([search.experiment_id], query)
    assert [it.info.run_id for it in same] == [search.run_id]


def test_a_state_is_mlflows_status_and_a_tag(registry: Registry, name: str) -> None:
    """A trial that the scheduler stopped is finished; one that still runs is killed."""
    search = registry.start_search(name, {}, {})
    for state in ("finished", "stopped", "failed", "interrupted"):
        search.trial_started(state, CONFIG)
        search.trial_ended(state, state, error="out of memory" if state == "failed" else "")
    search.trial_started("running", CONFIG)
    search.finish("KILLED")
    search.close()
    ended = {trial: run(registry, run_id) for trial, run_id in search.run_ids.items()}
    assert {trial: it.info.status for trial, it in ended.items()} == {
        "finished": "FINISHED",
        "stopped": "FINISHED",
        "failed": "FAILED",
        "interrupted": "KILLED",
        "running": "KILLED",
    }
    assert ended["stopped"].data.tags["orchestrator.state"] == "stopped"
    assert ended["failed"].data.tags["orchestrator.error"] == "out of memory"
    assert ended["running"].data.tags["orchestrator.state"] == "interrupted"
    assert run(registry, search.run_id).info.status == "KILLED"


def test_thousands_of_reports_go_out_in_few_calls(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More reports than MLflow takes in one call arrive, many of them in each call."""
    sizes: list[int] = []
    log_batch = MlflowClient.log_batch

    def counted(
        client: MlflowClient, run_id: str, metrics: Any = (), *rest: Any, **more: Any
    ) -> Any:
        sizes.append(len(metrics))
        return log_batch(client, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    with registry.start_search(name, {f"p{number}": number for number in range(250)}, {}) as search:
        search.trial_started("t1", CONFIG)
        for step in range(2500):
            search.trial_metrics("t1", step, {"loss": float(step)})
    points = history(registry, search.run_ids["t1"], "loss")
    assert points == [(step, float(step)) for step in range(2500)]
    assert max(sizes) > 100 and len(sizes) < 250
    assert len(run(registry, search.run_id).data.params) == 250


def test_a_resumed_search_goes_on_in_the_same_runs(registry: Registry, name: str) -> None:
    """Runs are found by their trial's tag, so that no second run is made.

    That holds even if an interruption lost the table of runs.
    """
    search = registry.start_search(name, {}, {})
    search.trial_started("t1", CONFIG)
    search.trial_metrics("t1", 10, {"loss": 1.0})
    search.finish("KILLED")
    with registry.resume_search(search.run_id) as again:
        assert again.run_ids == search.run_ids
        again.trial_started("t1", CONFIG)
        again.trial_metrics("t1", 20, {"loss": 0.5})
        again.trial_ended("t1", "finished")
    child = run(registry, search.run_ids["t1"])
    assert (again.run_id, again.run_ids) == (search.run_id, search.run_ids)
    assert child.info.status == run(registry, search.run_id).info.status == "FINISHED"
    assert history(registry, child.info.run_id, "loss") == [(10, 1.0), (20, 0.5)]


def test_an_error_in_the_search_ends_its_run_as_failed(registry: Registry, name: str) -> None:
    with (
        pytest.raises(RuntimeError, match="worker lost"),
        registry.start_search(name, {}, {}) as search,
    ):
        raise RuntimeError("worker lost")
    assert run(registry, search.run_id).info.status == "FAILED"


def test_a_refused_entry_is_reported_and_the_rest_written(
    registry: Registry, name: str, tmp_path: Path
) -> None:
    """MLflow refuses to change a parameter: that is reported, and the search goes on."""
    search = registry.start_search(name, {"p": 1}, {}, spill=tmp_path / "left.jsonl")
    assert search.flush(10)
    search.parent_params({"p": 2})
    assert search.flush(10)
    search.parent_metrics({"m": 1.0})
    with pytest.raises(JobFailed, match="refused 1 entry of"):
        search.finish()
    assert load_entries(tmp_path / "left.refused.jsonl")[0].params == {"p": "2"}
    parent = run(registry, search.run_id)
    assert parent.info.status == "FINISHED" and parent.data.metrics == {"m": 1.0}


def test_a_deleted_experiment_is_refused_before_anything_runs(
    registry: Registry, name: str
) -> None:
    search = registry.start_search(name, {}, {})
    search.finish()
    registry._store.client.delete_experiment(search.experiment_id)
    with pytest.raises(BadInput, match="was deleted in MLflow"):
        registry.start_search(name, {}, {})


def test_artifacts_lie_beside_the_database(local: Registry, name: str) -> None:
    """Artifacts are not below the working directory that the search was started in."""
    with local.start_search(name, {}, {}) as search:
        pass
    experiment = local._store.client.get_experiment(search.experiment_id)
    assert (
        Path(experiment.artifact_location)
        == Path(local.tracking_uri.removeprefix("sqlite:///")).parent / "mlruns" / name
    )


def test_nothing_is_lost_when_the_server_restarts_or_stays_away(
    server: Any, name: str, tmp_path: Path
) -> None:
    """Reports during an outage arrive after it.

    If the outage lasts to the end, a file keeps them, and a resumed search writes them.
    """
    registry, spill = Registry(server.uri), tmp_path / "left.jsonl"
    patient = registry.start_search(name, {}, {}, patience=30)
    hasty = registry.start_search(name, {}, {}, spill=spill, patience=0.5)
    for search in (patient, hasty):
        search.trial_started("t1", CONFIG)
        search.trial_metrics("t1", 10, {"loss": 1.0})
        assert search.flush(10)
    server.stop()
    for search in (patient, hasty):
        search.trial_started("t2", CONFIG)
        search.trial_metrics("t1", 20, {"loss": 0.5})
    with pytest.raises(Unreachable, match="could not be written") as failure:
        hasty.finish()
    assert str(spill) in failure.value.hint
    assert [entry.kind for entry in load_entries(spill)] == ["start", "log", "finish"]
    assert not patient.flush(0)
    server.start()
    patient.finish()
    with registry.resume_search(hasty.run_id, spill=spill) as again:
        pass
    assert not spill.exists()
    for search in (patient, again):
        assert history(registry, search.run_ids["t1"], "loss") == [(10, 1.0), (20, 0.5)]
        assert set(search.run_ids) == {"t1", "t2"}
        assert run(registry, search.run_id).info.status == "FINISHED"


def test_a_resumed_search_may_repeat_itself(registry: Registry, name: str) -> None:
    """A point that comes again with the same time is the same point.

    Ended runs are known, and parameters are kept.
    """
    search = registry.start_search(name, {"p": 1}, {})
    for trial in ("over", "open"):
        search.trial_started(trial, CONFIG, at=1_000)
        search.trial_metrics(trial, 10, {"loss": 0.5}, at=2_000)
    search.trial_ended("over", "stopped", at=3_000)
    search.finish("KILLED")
    with registry.resume_search(search.run_id, params={"p": 2, "q": 3}) as again:
        assert again.ended == {"over"}
        again.trial_started("open", CONFIG, at=1_000)
        again.trial_metrics("open", 10, {"loss": 0.5}, at=2_000)
        again.trial_metrics("open", 20, {"loss": 0.25})
        again.trial_ended("open", "finished")
    assert again.run_ids == search.run_ids
    assert history(registry, again.run_ids["open"], "loss") == [(10, 0.5), (20, 0.25)]
    assert run(registry, again.run_ids["over"]).info.end_time == 3_000
    assert run(registry, search.run_id).data.params == {"p": "1", "q": "3"}
    assert {run(registry, it).info.status for it in again.run_ids.values()} == {"FINISHED"}
