"""Check at a search's start what its end needs: experiments, permissions, and places to write.

A search takes hours; what would stop its registration should stop it before it begins. Nothing that is written here
stays, but for the experiment of the aliases' history, which every registered model needs.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestrator.errors import BadInput
from orchestrator.registry.aliases.ledger import LEDGER_TAG, Ledger, is_purged
from orchestrator.registry.runs.searches import HISTORY_EXPERIMENT, experiment_named, refuse_deleted
from orchestrator.registry.store import Store, sqlite_file
from orchestrator.registry.versions.refs import printable

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import RegisteredModel

CHECK_TAG = "orchestrator.check"
NOTE = "Every move of an alias of a registered prompt: one run for each model, a parameter for each move."


def check_search_end(store: Store, search: str, model: str | None, cache: Path) -> None:
    """Raise BadInput or Unreachable for what the end of a search would fail at.

    ``search`` names the experiment, ``model`` the registered model; None for a search that registers nothing.
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
    with store.translating(
        f"checking {HISTORY_EXPERIMENT}, the experiment with the history of aliases"
    ):
        history = experiment_named(store, HISTORY_EXPERIMENT)
        if not _check_file(store.tracking_uri):
            store.client.set_experiment_tag(history.experiment_id, "mlflow.note.content", NOTE)
    with store.translating(f"checking that {printable(model)} can be registered"):
        _check_model(store, model)
    _check_writable(
        cache, "the cache of prompts", "set XDG_CACHE_HOME to a folder that you may write to"
    )


def _check_model(store: Store, name: str) -> None:
    """Refuse a registered model that no version can be added to, or whose aliases can't move."""
    model = _registered_model(store, name)
    is_file = _check_file(store.registry_uri)
    if model is None:
        if store.client.get_prompt(name) is not None:
            raise BadInput(
                f"{printable(name)} is a text template of MLflow's prompt registry",
                "set registry.model to another name",
            )
        if not is_file:
            _try_creating(store, name)
        return
    run_id = model.tags.get(LEDGER_TAG)
    if run_id and not is_purged(store, run_id):
        Ledger(store, name, run_id).check(may_write=sqlite_file(store.tracking_uri) is None)
    if not is_file:
        store.client.set_registered_model_tag(name, CHECK_TAG, "a search begins")
        store.client.delete_registered_model_tag(name, CHECK_TAG)


def _check_file(uri: str) -> bool:
    """Tell whether the store is an SQLite file, which has no permissions of its own; refuse one that is read-only."""
    file = sqlite_file(uri)
    if file is not None and not os.access(file, os.W_OK):
        raise BadInput(f"{uri} may only be read", f"make {file} writable, or use another database")
    return file is not None


def _registered_model(store: Store, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _try_creating(store: Store, name: str) -> None:
    """Create and delete a model of a similar name: another search may be creating the name itself."""
    probe = f"{name[:200]}.check-{uuid.uuid4().hex[:8]}"
    store.client.create_registered_model(probe)
    store.client.delete_registered_model(probe)


def _check_new_artifacts(store: Store, search: str) -> None:
    if store.artifact_root:
        _check_writable(
            store.artifact_root / search, "the folder of MLflow's artifacts", ARTIFACT_HINT
        )


def _check_artifacts(experiment: Experiment) -> None:
    """Check an artifact folder on this machine; a server's is checked when the search's run begins."""
    parts = urlsplit(experiment.artifact_location)
    if parts.scheme not in ("", "file"):
        return
    path = parts.path if parts.scheme else experiment.artifact_location
    _check_writable(Path(unquote(path)), "the folder of MLflow's artifacts", ARTIFACT_HINT)


ARTIFACT_HINT = "make it writable and free some space; the prompt that a search finds is kept there"


def _check_writable(folder: Path, what: str, hint: str) -> None:
    """Write a file of a few bytes and remove it."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as stream:
            stream.write(b"0" * 4096)
    except OSError as error:
        raise BadInput(f"{what} {folder} can't be written ({error.strerror})", hint) from None
