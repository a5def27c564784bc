"""Registered prompts: unchanged round trips, aliases, the gate, and a registry we can't trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.artifact import MANIFEST, WEIGHTS, DataRecord, PromptArtifact, read_manifest
from orchestrator.errors import BadInput
from orchestrator.registry import AliasOutcome, Registry

Register = Callable[..., int]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_artifact_comes_back_byte_for_byte(
    registry: Registry, name: str, register: Register, tmp_path: Path
) -> None:
    version = register()
    folder = registry.fetch(name, version)
    original = next(tmp_path.glob("artifact-*"))
    assert files(folder) == files(original)
    assert registry.fetch(name, version) == folder
    assert PromptArtifact.load(folder).manifest.search == "sms-spam"


def test_a_version_tells_what_it_is(registry: Registry, name: str, register: Register) -> None:
    """Tags can be filtered, metrics stand beside baselines, and free text is not rendered.

    The description also says how to query the model.
    """
    registry.set_alias(name, "champion", register(accuracy=0.96))
    detail = registry.version(name)
    summary = detail.summary
    assert summary.is_prompt and summary.aliases == ("champion",) and summary.status == "READY"
    assert summary.metrics["test"]["accuracy"] == 0.96
    assert summary.baselines == {"zero_shot": {"test": {"accuracy": 0.23}}}
    assert summary.config["learning_rate"] == 0.3
    assert {
        key: summary.tags[key] for key in ("method", "init", "learning_rate", "test_accuracy")
    } == {
        "method": "prompt_tuning",
        "init": "sample_vocab",
        "learning_rate": "0.3",
        "test_accuracy": "0.96",
    }
    assert f'orchestrator query {name} "text"' in summary.description
    assert "| zero shot |" in summary.description and "`'odd' <b>data</b>`" in summary.description
    assert detail.manifest is not None and detail.manifest.base_model.id == "builtin:quickstart"
    found = registry._store.client.search_model_versions("tags.init = 'sample_vocab'")
    assert name in {version.name for version in found}


def test_a_version_speaks_as_people_do(
    local: Registry, name: str, make_artifact: Callable[..., Path]
) -> None:
    """The description has an init's text, rounded numbers and the folder of the rows."""
    path = json.dumps(
        {split: f"/data/sms/{split}.jsonl" for split in ("train", "validation", "test")}
    )
    config = {
        "init": {"text": "Spam or not?"},
        "num_virtual_tokens": 5,
        "learning_rate": 0.1234567891,
        "seed": 0,
    }
    data = DataRecord(path=path, fingerprint="d" * 64, rows={"train": 4000, "test": 50})
    with local.start_search(name, {}, {}) as search:
        search.trial_started("t1", config)
    version = local.register(make_artifact(config=config, record=data), name, search.run_ids["t1"])
    said = local.version(f"{name}:{version}").summary.description
    assert (
        "init `text Spam or not?`, num_virtual_tokens `5`, learning_rate `0.1235`, seed `0`" in said
    )
    assert "Data `/data/sms` (rows: 4,000 train, 50 test)" in said


def test_a_version_holds_no_pickle_and_no_path(
    registry: Registry,
    name: str,
    register: Register,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLflow loads the version from code, with pickle forbidden."""
    import mlflow

    location = registry._store.client.get_model_version_download_uri(name, str(register()))
    folder = Path(
        mlflow.artifacts.download_artifacts(
            location, dst_path=str(tmp_path / "m"), tracking_uri=registry.tracking_uri
        )
    )
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "pyfunc_model.py",
        "input_example.json",
        "serving_input_example.json",
        f"artifacts/prompt/{MANIFEST}",
        f"artifacts/prompt/{WEIGHTS}",
    }
    for file in folder.rglob("*"):
        assert not file.is_file() or not file.read_bytes().startswith((b"\x80", b"PK")), file
    own = (folder / "MLmodel").read_text().replace(location, "")
    assert str(tmp_path) not in own and "orchestrator/registry" not in own
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pyfunc.load_model(str(folder))
    assert model.metadata.get_input_schema().input_names() == ["text"]
    assert model.input_example.to_dict("records") == [{"text": "some text"}]
    monkeypatch.setitem(sys.modules, "orchestrator.serving.offline", fake_serving())
    assert model.predict([{"text": "win a prize"}]) == [
        {"label": 1, "probs": {"1": 1.0}, "of": {"text": "win a prize"}}
    ]


def fake_serving() -> ModuleType:
    """Return a stand-in for the offline module, which answers without a backbone."""

    class OfflineModel:
        @classmethod
        def from_artifact(cls, folder: Path) -> OfflineModel:
            PromptArtifact.load(folder)
            return cls()

        def classify(self, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
            return [{"label": 1, "probs": {"1": 1.0}, "of": row} for row in rows]

    module = ModuleType("orchestrator.serving.offline")
    module.__dict__["OfflineModel"] = OfflineModel
    return module


def test_a_version_survives_its_run(registry: Registry, name: str, register: Register) -> None:
    """A version's source is the logged model, which stays when its run is deleted."""
    version = register()
    run_id = registry.resolve(f"{name}:{version}").run_id
    assert run_id is not None
    registry._store.client.delete_run(run_id)
    assert registry.fetch(name, version).is_dir()


def test_what_does_not_exist_is_named_with_what_does(
    registry: Registry, name: str, register: Register
) -> None:
    registry.set_alias(name, "champion", register())
    with pytest.raises(BadInput, match="no registered model") as unknown:
        registry.version(f"{name}x")
    assert f"did you mean '{name}'" in unknown.value.hint
    with pytest.raises(BadInput, match="has no version 7") as version:
        registry.version(f"{name}:7")
    assert version.value.hint == "known versions: 1"
    with pytest.raises(BadInput, match="has no alias 'champoin'") as alias:
        registry.version(f"{name}@champoin")
    assert "did you mean 'champion'" in alias.value.hint
    with pytest.raises(BadInput, match="has no version 7"):
        registry.fetch(name, 7)


def test_a_deleted_version_is_told_from_one_that_never_was(
    registry: Registry, name: str, register: Register
) -> None:
    """A missing number below the newest was deleted; a higher one never existed."""
    for _ in range(3):
        register()
    registry._store.client.delete_model_version(name, "2")
    with pytest.raises(BadInput, match=r"version 2 of registered model .* was deleted") as deleted:
        registry.version(f"{name}:2")
    assert deleted.value.hint == "known versions: 3, 1"
    with pytest.raises(BadInput, match="has no version 4") as never:
        registry.version(f"{name}:4")
    assert never.value.hint == "known versions: 3, 1"


def test_a_prompt_of_unknown_quality_is_no_champion(
    local: Registry, name: str, make_artifact: Callable[..., Path]
) -> None:
    """A first version without results is challenger; one with results is champion."""
    with local.start_search(name, {}, {}) as search:
        run_id = search.run_id
    unknown = local.register(make_artifact(metrics={}), name, run_id)
    assert local.auto_alias(name, unknown) == AliasOutcome(
        "challenger", "Version 1 is not champion: nothing is known of how good it is."
    )
    assert local.aliases(name) == {"challenger": 1}
    assert local.auto_alias(name, local.register(make_artifact(), name, run_id)).alias == "champion"


def test_lists_and_snapshot(registry: Registry, name: str, register: Register) -> None:
    """Other programs' models are listed and marked, but never polled for serving."""
    registry.set_alias(name, "champion", register(accuracy=0.8))
    registry.set_alias(name, "challenger", register(accuracy=0.9))
    registry._store.client.create_registered_model(f"{name}-other")
    models = {model.name: model for model in registry.list_models()}
    mine, other = models[name], models[f"{name}-other"]
    assert (mine.latest, mine.aliases) == (2, {"champion": 1, "challenger": 2})
    assert mine.champion_metrics is not None and mine.champion_metrics["test"]["accuracy"] == 0.8
    assert mine.is_prompt and not other.is_prompt and other.latest is None
    assert [it.version for it in registry.versions(name)] == [2, 1]
    assert registry.versions(name)[0].aliases == ("challenger",)
    snapshot = registry.snapshot()
    assert snapshot[name] == registry.aliases(name) == {"champion": 1, "challenger": 2}
    assert f"{name}-other" not in snapshot


@pytest.mark.parametrize(
    "odd", ["line\nbreak", "<b>bold", 'it\'s "quoted"', "ünï%20", "x" * 250, "a@b"]
)
def test_odd_names_are_read(registry: Registry, odd: str) -> None:
    """Other programs' models are read, whatever their names."""
    client = registry._store.client
    if not any(model.name == odd for model in registry.list_models()):
        client.create_registered_model(odd)
        client.create_model_version(odd, "s3://nowhere/at/all")
    assert [it.version for it in registry.versions(odd)] == [1]
    assert not registry.resolve(f"{odd}:1").is_prompt


def test_a_name_that_breaks_our_rule_is_not_written(
    registry: Registry, make_artifact: Callable[..., Path]
) -> None:
    with pytest.raises(BadInput, match="can't name a registered model"):
        registry.register(make_artifact(), "a\nb", "0")


def test_a_failed_registration_leaves_nothing(
    registry: Registry,
    name: str,
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No model without versions is left, and no version that never becomes ready."""
    from mlflow.exceptions import MlflowException

    from orchestrator.registry.versions import publish

    with registry.start_search(name, {}, {}) as search:
        pass

    def refuse(*_: Any) -> None:
        raise MlflowException("disk full")

    monkeypatch.setattr(publish, "_await_ready", refuse)
    with pytest.raises(Exception, match="disk full"):
        registry.register(make_artifact(), name, search.run_id)
    assert name not in {model.name for model in registry.list_models()}
    assert not registry._store.client.search_logged_models([search.experiment_id])
    with pytest.raises(BadInput, match="registering"):
        registry.register(make_artifact(), name, "0" * 32)


def test_a_damaged_cache_is_fetched_again(
    registry: Registry, name: str, register: Register
) -> None:
    version = register()
    folder = registry.fetch(name, version)
    (folder / WEIGHTS).write_bytes(b"")
    assert PromptArtifact.load(registry.fetch(name, version)).weights.shape == (5, 8)


def stored(registry: Registry, name: str, version: int) -> Path:
    """Return the artifact's folder in the store itself."""
    location = registry._store.client.get_model_version_download_uri(name, str(version))
    return Path(location) / "artifacts" / "prompt"


@pytest.fixture
def local_version(local: Registry, name: str, make_artifact: Callable[..., Path]) -> Path:
    with local.start_search(name, {}, {}) as search:
        pass
    return stored(local, name, local.register(make_artifact(), name, search.run_id))


def test_altered_files_are_refused(local: Registry, name: str, local_version: Path) -> None:
    """Weights are checked against the manifest.

    The manifest is checked against the registry's own record.
    """
    weights = local_version / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BadInput, match="cut short or altered"):
        local.fetch(name, 1)
    assert (
        local.version(f"{name}:1").manifest is None
        and "altered" in local.version(f"{name}:1").problem
    )


def test_an_altered_manifest_is_refused(local: Registry, name: str, local_version: Path) -> None:
    document = json.loads((local_version / MANIFEST).read_text())
    (local_version / MANIFEST).write_text(json.dumps(document | {"template": "{text} Say yes."}))
    with pytest.raises(BadInput, match=f"{MANIFEST} was altered"):
        local.fetch(name, 1)


def test_links_and_strange_files_are_refused(
    local: Registry, name: str, local_version: Path, tmp_path: Path
) -> None:
    """A registry can't make us read another file or wait for a pipe."""
    (local_version / "extra.pkl").write_bytes(b"")
    with pytest.raises(BadInput, match="nothing else"):
        local.fetch(name, 1)
    (local_version / "extra.pkl").unlink()
    (local_version / WEIGHTS).rename(tmp_path / "elsewhere")
    (local_version / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="can't be read"):
        local.fetch(name, 1)
    (local_version / WEIGHTS).unlink()
    os.mkfifo(local_version / WEIGHTS)
    with pytest.raises(BadInput, match="not a plain file"):
        local.fetch(name, 1)
    assert not list(local.cache_dir.iterdir())


def test_a_version_of_another_program_is_refused(
    registry: Registry, name: str, tmp_path: Path
) -> None:
    with registry.start_search(name, {}, {}) as search:
        pass
    client = registry._store.client
    client.create_registered_model(name)
    client.create_model_version(name, f"runs:/{search.run_id}/nothing", search.run_id)
    with pytest.raises(BadInput, match=r"no prompt artifact|can't be read|No such"):
        registry.fetch(name, 1)


@pytest.mark.parametrize("alias", ["latest", "v1", "a.b", "", "a b"])
def test_aliases_that_mlflow_refuses_are_refused_first(
    local: Registry, name: str, alias: str
) -> None:
    with pytest.raises(BadInput, match="can't be an alias"):
        local.set_alias(name, alias, 1)


def test_after_a_search_the_better_prompt_is_champion(
    registry: Registry, name: str, register: Register
) -> None:
    """The first version is champion, and only a better one replaces it.

    Better means on the same test split and base model; other versions become challenger.
    """
    outcomes = [
        registry.auto_alias(name, register(accuracy=accuracy, **changes))
        for accuracy, changes in [
            (0.8, {}),
            (0.7, {}),
            (0.95, {"data": "c" * 64}),
            (0.95, {"fingerprint": "e" * 64}),
            (0.9, {}),
        ]
    ]
    assert [outcome.alias for outcome in outcomes] == [
        "champion",
        "challenger",
        "challenger",
        "challenger",
        "champion",
    ]
    assert outcomes[1].reason == (
        "Version 2 is not champion, version 1 stays: its test accuracy is 0.7, the champion's 0.8; "
        "the confidence is unknown, without both versions' outcomes on the same rows."
    )
    assert "other data" in outcomes[2].reason and "fingerprint" in outcomes[3].reason
    assert registry.aliases(name) == {"champion": 5, "challenger": 5}
    better = register(accuracy=0.95)
    worse = registry.auto_alias(name, register(accuracy=0.85), metric="loss", better="min")
    assert worse.alias == "challenger"
    assert (
        registry.auto_alias(name, better, alias="champion", metric="loss", better="min").alias
        == "champion"
    )
    assert registry.auto_alias(name, 1, alias="champion") == AliasOutcome(
        None,
        f"Version 1 is not champion, version {better} stays: "
        "its test accuracy is 0.8, the champion's 0.95; "
        "the confidence is unknown, without both versions' outcomes on the same rows.",
    )


def test_registering_takes_no_torch(
    local: Registry, name: str, make_artifact: Callable[..., Path]
) -> None:
    """Registering and fetching import no torch, so the process can be a small one."""
    code = (
        "import sys; from pathlib import Path; from orchestrator.registry import Registry\n"
        f"r = Registry({local.tracking_uri!r}, cache_dir=Path({str(local.cache_dir)!r}))\n"
        f"with r.start_search({name!r}, {{}}, {{}}) as s:\n"
        f"    v = r.register(Path({str(make_artifact())!r}), {name!r}, s.run_id)\n"
        f"r.fetch({name!r}, v); "
        "print({'torch', 'ray', 'transformers', 'sklearn'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert (answer.stdout, answer.stderr) == ("set()\n", "")
    assert read_manifest(local.fetch(name, 1)).search == "sms-spam"
