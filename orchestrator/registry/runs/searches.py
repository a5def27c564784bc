"""Opening a search's run in MLflow: a new run, or that of an earlier attempt."""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import DataRecord
from orchestrator.errors import BadInput
from orchestrator.registry.runs.entries import MAX_TAG, as_texts
from orchestrator.registry.runs.search_log import STATE_TAG, SearchLog, children
from orchestrator.registry.store import Store, artifact_location, sqlite_file
from orchestrator.registry.versions.refs import printable
from orchestrator.utils.text import mask_secrets

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Experiment, Run


ENDED = ("FINISHED", "FAILED")
HISTORY_EXPERIMENT = "orchestrator-aliases"
"""The experiment with one run per registered model; its parameters are the moves of its aliases."""


DESCRIPTION = "search.json"
MAX_DIGEST = 36  # MLflow's limit for a data set's digest
MAX_DATA_NAME = 500
MAX_SOURCE = 65_535


def start(
    store: Store,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    data: DataRecord | None,
    spill: Path | None,
    patience: float,
) -> SearchLog:
    """Create a run in the search's experiment, which is created if it doesn't exist yet."""
    experiment = experiment_named(store, name)
    own = {STATE_TAG: "running", "mlflow.source.name": "orchestrator", **_user_tag()}
    run = store.client.create_run(
        experiment.experiment_id,
        tags=as_texts({**tags, **own}, MAX_TAG),
        run_name=f"{name} {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}",
    )
    if data is not None:
        store.client.log_inputs(run.info.run_id, [_data_input(data)])
    _log_description(store, run, params)
    log = SearchLog(store, run, {}, spill or _default_spill(run.info.run_id), patience)
    log.parent_params(params)
    return log


def _log_description(store: Store, run: Run, params: Mapping[str, Any]) -> None:
    """Store the search's full parameters as a file.

    If this fails, storing the prompt at the end would fail too, so the run is marked as failed.
    Raises BadInput when the artifact folder can't be written.
    """
    try:
        store.client.log_text(
            run.info.run_id, json.dumps(params, indent=2, default=str), DESCRIPTION
        )
    except Exception as error:
        store.client.set_terminated(run.info.run_id, "FAILED")
        if not isinstance(error, OSError):
            raise
        raise BadInput(
            f"no artifacts can be written to {mask_secrets(run.info.artifact_uri)} "
            f"({error.strerror or error})",
            "make that place writable and free some space; the prompt that a search finds is kept "
            "there",
        ) from None


def _data_input(data: DataRecord) -> DatasetInput:
    """Describe the rows as a data set that MLflow shows and filters by name and by digest.

    The name says where the rows are from; the digest is their fingerprint.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = Dataset(
        data.place[:MAX_DATA_NAME],
        data.fingerprint[:MAX_DIGEST],
        source_type="orchestrator",
        source=json.dumps({"path": data.path})[:MAX_SOURCE],
        profile=json.dumps({"rows": data.rows}),
    )
    return DatasetInput(found, [InputTag("mlflow.data.context", "tuning")])


def resume(
    store: Store,
    parent_run_id: str,
    run_ids: Mapping[str, str],
    params: Mapping[str, Any],
    spill: Path | None,
    patience: float,
) -> SearchLog:
    """Set an earlier search's run to running again, and log the ``params`` that it lacks."""
    run = store.client.get_run(parent_run_id)
    refuse_deleted_run(store, run, "the search")
    _log_description(store, run, params)
    store.client.update_run(parent_run_id, status="RUNNING")
    store.client.set_tag(parent_run_id, STATE_TAG, "running")
    experiment = run.info.experiment_id
    known = children(store, experiment, parent_run_id)
    ended = {
        trial for status in ENDED for trial in children(store, experiment, parent_run_id, status)
    }
    log = SearchLog(
        store, run, known | dict(run_ids), spill or _default_spill(parent_run_id), patience, ended
    )
    if missing := {name: value for name, value in params.items() if name not in run.data.params}:
        log.parent_params(missing)
    return log


def experiment_named(store: Store, name: str) -> Experiment:
    """Return the experiment of that name, which is created if it doesn't exist yet.

    Raises BadInput for an experiment that can't be used.
    """
    experiment = store.client.get_experiment_by_name(name)
    if experiment is None:
        root = store.artifact_root
        return store.client.get_experiment(
            _create_experiment(store, name, root / name if root else None)
        )
    check_usable(store, experiment)
    return experiment


def check_usable(store: Store, experiment: Experiment) -> None:
    """Raise BadInput if no run can be added to the experiment from here."""
    refuse_deleted(experiment)
    if experiment.artifact_location.startswith("mlflow-artifacts:") and sqlite_file(
        store.tracking_uri
    ):
        raise BadInput(
            f"experiment {printable(experiment.name)} was made through an MLflow server, which "
            "alone reaches its artifacts",
            "set MLFLOW_TRACKING_URI to that server's address, or give the search another name",
        )


def refuse_deleted(experiment: Experiment) -> None:
    """Raise BadInput for an experiment in MLflow's trash, where it still occupies its name."""
    if experiment.lifecycle_stage == "active":
        return
    restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
    internal = experiment.name == HISTORY_EXPERIMENT
    raise BadInput(
        f"experiment {printable(experiment.name)} was deleted in MLflow"
        + (
            ", and the history of all aliases with it"
            if internal
            else ", and its name is still taken"
        ),
        restore if internal else f"{restore}, or give the search another name",
    )


def refuse_deleted_run(store: Store, run: Run, what: str) -> None:
    """Raise BadInput for a run in MLflow's trash, deleted alone or with its experiment.

    ``what`` names the run's content in the message.
    """
    if run.info.lifecycle_stage == "active":
        return
    experiment = store.client.get_experiment(run.info.experiment_id)
    alone = experiment.lifecycle_stage == "active"
    raise BadInput(
        f"{what} is in MLflow run {run.info.run_id}, which was deleted"
        + ("" if alone else f" with its experiment {printable(experiment.name)}"),
        f"mlflow runs restore --run-id {run.info.run_id}"
        if alone
        else f"mlflow experiments restore --experiment-id {experiment.experiment_id}",
    )


def _create_experiment(store: Store, name: str, location: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(
            store.client.create_experiment(name, artifact_location(location) if location else None)
        )
    except MlflowException as error:
        experiment = store.client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
            raise
        return str(experiment.experiment_id)  # another search created it in the meantime


def _default_spill(run_id: str) -> Path:
    return Path(f"mlflow-unwritten-{run_id}.jsonl").absolute()


def _user_tag() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # a container's user may have no name
        return {}
