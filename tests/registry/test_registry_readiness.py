"""A search's start checks what its end needs, and the check leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import BadInput
from orchestrator.registry import Registry

HISTORY = "orchestrator-aliases"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    Registry(f"sqlite:///{file}").check()
    return file


@pytest.fixture
def own(empty_database: Path, tmp_path: Path) -> Registry:
    """A store of the test's own, whose internal experiment may be deleted."""
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache")


def delete_experiment(registry: Registry, name: str) -> str:
    client = registry._store.client
    experiment = client.get_experiment_by_name(name)
    client.delete_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def registered(registry: Registry, artifact: Path, name: str = "spam") -> int:
    with registry.start_search(name, {}, {}) as search:
        run_id = search.run_id
    return registry.register(artifact, name, run_id)


def history_run(registry: Registry, name: str = "spam") -> str:
    return str(registry._store.client.get_registered_model(name).tags["orchestrator.alias_history"])


def restored(registry: Registry, hint: str) -> None:
    """Restore the experiment or the run that the hint names."""
    experiment = re.search(r"mlflow experiments restore --experiment-id (\d+)", hint)
    run = re.search(r"mlflow runs restore --run-id (\w+)", hint)
    if experiment:
        registry._store.client.restore_experiment(experiment[1])
    elif run:
        registry._store.client.restore_run(run[1])
    else:
        raise AssertionError(hint)


def test_a_deleted_history_is_refused_for_old_and_new_models(
    own: Registry, make_artifact: Callable[..., Path]
) -> None:
    """The hint does not suggest another name, which would not help, but a restore, which does."""
    own.auto_alias("spam", registered(own, make_artifact()))
    delete_experiment(own, HISTORY)
    for model in ("spam", "another"):
        with pytest.raises(
            BadInput,
            match=f"(experiment {HISTORY} was deleted|deleted with its experiment {HISTORY})",
        ) as refused:
            own.check_search_end(model, model)
        assert "another name" not in refused.value.hint
    with pytest.raises(BadInput, match="deleted with its experiment") as move:
        own.set_alias("spam", "staging", 1)
    restored(own, move.value.hint)
    own.check_search_end("spam", "spam")
    own.set_alias("spam", "staging", 1)
    assert own.aliases("spam")["staging"] == 1 and len(own.history("spam")) == 3


def test_a_models_own_history_may_be_deleted_alone(
    own: Registry, make_artifact: Callable[..., Path]
) -> None:
    own.auto_alias("spam", registered(own, make_artifact()))
    own._store.client.delete_run(history_run(own))
    own.check_search_end("another", "another")
    with pytest.raises(BadInput, match="the history of spam's aliases") as refused:
        own.check_search_end("spam", "spam")
    restored(own, refused.value.hint)
    own.check_search_end("spam", "spam")


def test_a_purged_history_begins_anew(own: Registry, make_artifact: Callable[..., Path]) -> None:
    """A history that ``mlflow gc`` removed starts anew.

    It can't be restored, so the model's aliases could never move again.
    """
    own.auto_alias("spam", registered(own, make_artifact()))
    run_id = history_run(own)
    own._store.client.delete_run(run_id)
    own._store.client._tracking_client.store._hard_delete_run(run_id)
    own.check_search_end("spam", "spam")
    own.set_alias("spam", "staging", 1)
    assert [move.alias for move in own.history("spam")] == ["staging"]
    assert history_run(own) != run_id


def test_the_searchs_own_experiment_may_not_be_deleted(
    own: Registry, make_artifact: Callable[..., Path]
) -> None:
    """Neither a new nor a resumed search accepts a deleted experiment."""
    with own.start_search("spam", {}, {}) as search:
        run_id = search.run_id
    delete_experiment(own, "spam")
    with pytest.raises(BadInput, match="experiment spam was deleted") as refused:
        own.check_search_end("spam", None)
    with pytest.raises(BadInput, match="deleted with its experiment spam"):
        own.resume_search(run_id)
    restored(own, refused.value.hint)
    own.check_search_end("spam", None)
    own.resume_search(run_id).finish()


def test_a_search_that_registers_nothing_needs_no_history(own: Registry) -> None:
    """A search of a baseline runs while the alias history is in MLflow's trash."""
    own._store.client.create_experiment(HISTORY)
    delete_experiment(own, HISTORY)
    with pytest.raises(BadInput, match="the history of all aliases"):
        own.check_search_end("spam", "spam")
    own.check_search_end("spam", None)


def test_places_that_can_not_be_written_are_named(own: Registry, tmp_path: Path) -> None:
    """Unwritable places are named: a new experiment's artifacts, and the prompt cache.

    The cache is needed to compare with the champion.
    """
    root = own._store.artifact_root
    assert root is not None
    root.write_text("a file where a folder belongs")
    with pytest.raises(BadInput, match=f"{re.escape(str(root))}.* can't be written"):
        own.check_search_end("spam", "spam")
    root.unlink()
    own.cache_dir.write_text("the same")
    with pytest.raises(BadInput, match=r"cache of prompts .*can't be written"):
        own.check_search_end("spam", "spam")


def test_a_run_whose_artifacts_can_not_be_written_is_refused(own: Registry) -> None:
    """The check finds an unwritable folder of an existing experiment.

    If it becomes unwritable later, the start of the run finds it.
    """
    with own.start_search("spam", {"a": 1}, {}):
        pass
    root = own._store.artifact_root
    assert root is not None
    shutil.rmtree(root / "spam")
    (root / "spam").write_text("a file where a folder belongs")
    with pytest.raises(BadInput, match="can't be written"):
        own.check_search_end("spam", "spam")
    with pytest.raises(BadInput, match="no artifacts can be written"):
        own.start_search("spam", {"a": 1}, {})
    runs = own._store.client.search_runs(["1"])
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED"}


def test_a_text_template_of_mlflow_is_no_registered_model(own: Registry) -> None:
    own._store.client.register_prompt("greeting", "Hello {{name}}")
    with pytest.raises(BadInput, match="text template") as refused:
        own.check_search_end("search", "greeting")
    assert "registry.model" in refused.value.hint


def test_the_check_leaves_nothing_behind(
    registry: Registry, name: str, make_artifact: Callable[..., Path]
) -> None:
    """The check changes nothing for new and existing models, also behind a server."""
    before = {model.name for model in registry.list_models()}
    registry.check_search_end(name, name)
    assert {model.name for model in registry.list_models()} == before
    registered(registry, make_artifact(), name)
    tags = registry._store.client.get_registered_model(name).tags
    registry.check_search_end(name, name)
    assert registry._store.client.get_registered_model(name).tags == tags
