"""Checks at a search's start that its end will work: experiments, permissions, writable folders.

A search takes hours, so anything that would stop its registration should stop the search before it
begins. The checks leave nothing behind, except the experiment of the aliases' history, which every
registered model needs.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestrator.errors import BadInput
from orchestrator.registry.aliases.ledger import LEDGER_TAG, Ledger
from orchestrator.registry.runs.searches import (
    HISTORY_EXPERIMENT,
    check_usable,
    experiment_named,
    refuse_deleted,
)
from orchestrator.registry.store import Store, sqlite_file
from orchestrator.registry.versions.refs import printable

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import RegisteredModel

CHECK_TAG = "orchestrator.check"
NOTE = (
    "Every move of an alias of a registered prompt: one run for each model, a parameter for each "
    "move."
)


def check_search_end(store: Store, search: str, model: str | None, cache: Path) -> None:
    """Raise BadInput or Unreachable for anything that the end of a search would fail at.

    ``search`` names the experiment. ``model`` names the registered model, or is None for a search
    that registers nothing.
    """
    with store.translating(f"checking the experiment {printable(search)}"):
        experiment = store.client.get_experiment_by_name(search)
        if experiment is None:
            _check_new_artifacts(store, search)
        else:
            refuse_deleted(experiment)
            _check_artifacts(experiment)
    if model is None:
        return
    with store.translating(f"checking that {printable(model)} can be registered"):
        registered = _registered_model(store, model)
        if registered is None:
            _check_new_model(store, model)
        elif sqlite_file(store.registry_uri) is None:
            # Deleting a missing tag changes nothing, but needs the same permission as creating a
            # version or an alias.
            store.client.delete_registered_model_tag(model, CHECK_TAG)
        _check_file(store.registry_uri)
    with store.translating("checking that moves of aliases can be recorded"):
        run_id = registered.tags.get(LEDGER_TAG) if registered is not None else None
        _check_history(store, model, run_id)
    _check_writable(
        cache, "the cache of prompts", "set XDG_CACHE_HOME to a folder that you may write to"
    )


def _check_new_model(store: Store, name: str) -> None:
    """Raise BadInput if no model of this name can be created."""
    if store.client.get_prompt(name) is not None:
        raise BadInput(
            f"{printable(name)} is a text template of MLflow's prompt registry",
            "set registry.model to another name",
        )
    if sqlite_file(store.registry_uri) is None:
        _try_creating(store, name)


def _check_history(store: Store, model: str, run_id: str | None) -> None:
    """Raise BadInput if the history was deleted or this login may not write it.

    ``run_id`` is the run of the model's history, if the model has one.
    """
    may_write = sqlite_file(store.tracking_uri) is None
    _check_file(store.tracking_uri)
    if run_id and Ledger(store, model, run_id).is_usable(may_write):
        return
    # The model's history will be a new run in this experiment. A file needs no permission for it.
    if not may_write:
        existing = store.client.get_experiment_by_name(HISTORY_EXPERIMENT)
        if existing is not None:
            check_usable(store, existing)
    else:
        history = experiment_named(store, HISTORY_EXPERIMENT)
        with store.translating(f"writing to the experiment {HISTORY_EXPERIMENT}"):
            store.client.set_experiment_tag(history.experiment_id, "mlflow.note.content", NOTE)


def _check_file(uri: str) -> None:
    """Raise BadInput for a read-only SQLite file; SQLite has only the file's permissions."""
    file = sqlite_file(uri)
    if file is not None and not os.access(file, os.W_OK):
        raise BadInput(f"{uri} may only be read", f"make {file} writable, or use another database")


def _registered_model(store: Store, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _try_creating(store: Store, name: str) -> None:
    """Create and delete a model of a similar name to test the permission.

    The name itself is not used, because another search may be creating it at the same time.
    """
    probe = f"{name[:200]}.check-{uuid.uuid4().hex[:8]}"
    store.client.create_registered_model(probe)
    store.client.delete_registered_model(probe)


def _check_new_artifacts(store: Store, search: str) -> None:
    if store.artifact_root:
        _check_writable(
            store.artifact_root / search, "the folder of MLflow's artifacts", ARTIFACT_HINT
        )


def _check_artifacts(experiment: Experiment) -> None:
    """Check an artifact folder on this machine.

    An artifact store on a server is checked when the search's run begins.
    """
    parts = urlsplit(experiment.artifact_location)
    if parts.scheme not in ("", "file"):
        return
    path = parts.path if parts.scheme else experiment.artifact_location
    _check_writable(Path(unquote(path)), "the folder of MLflow's artifacts", ARTIFACT_HINT)


ARTIFACT_HINT = "make it writable and free some space; the prompt that a search finds is kept there"


def _check_writable(folder: Path, what: str, hint: str) -> None:
    """Write and remove a file of a few kilobytes."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as stream:
            stream.write(b"0" * 4096)
    except OSError as error:
        raise BadInput(f"{what} {folder} can't be written ({error.strerror})", hint) from None
