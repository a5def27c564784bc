"""The verbs export, import and inspect, on a real registry and a real base model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from models import load, model_folder, save_model
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from small_jobs import Command, write_job
from test_artifact import manifest
from test_run import COUNT, NUMBER, TEXT, record
from transformers import AutoModelForCausalLM

from orchestrator.artifact import BaseModelRecord, PromptArtifact, VerbalizerEntry
from orchestrator.artifact.peft import WEIGHTS
from orchestrator.job.space import TrialSpec
from orchestrator.models.adapter_folder import ADAPTER_CONFIG
from orchestrator.models.backbone import Backbone
from orchestrator.registry import Registry
from orchestrator.serving.offline import OfflineModel
from orchestrator.tuning.prompts import InitContext, Method, make_prompt

P = 3
VERBALIZER = (VerbalizerEntry(label=0, text=" a quick no"), VerbalizerEntry(label=1, text=" yes"))
METHODS = {
    "prompt": Method(),
    "prefix": Method("prefix_tuning", "mlp", 5),
    "inside": Method(inside=True),
}


@dataclass(frozen=True)
class Store:
    """A registry with one model per entry of METHODS, one version each, in a folder with a job."""

    folder: Path
    job: Path
    backbone: Backbone
    registry: Registry

    def artifact(self, name: str, version: int = 1) -> Path:
        return self.registry.fetch(name, version)

    @property
    def names(self) -> set[str]:
        return {model.name for model in self.registry.list_models()}


def moved_prompt(backbone: Backbone, name: str) -> PromptArtifact:
    """Return a prompt that started from a text and has moved away from it."""
    method, text = METHODS[name], "is this spam"
    spec = TrialSpec("text", text, P, 0.1, 0)
    prompt = make_prompt(method, spec, InitContext.of(backbone, []))
    generator = torch.Generator().manual_seed(2)
    for parameter in prompt.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tensors = {part: tensor.detach().numpy() for part, tensor in prompt().named().items()}
    about: dict[str, Any] = {
        "method": method.name, "num_virtual_tokens": P, "config": spec.config(),
        "verbalizer": VERBALIZER,
        "template": "{text} {*}\nspam?" if method.inside else "{text}\nspam?",
        "base_model": BaseModelRecord(**asdict(backbone.info)),
    }  # fmt: skip
    return PromptArtifact(tensors, manifest(**about))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("exchange")
    backbone = load(model_folder())
    registry = Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache" / "own")
    with registry.start_search("made", {}, {}) as search:
        for name in METHODS:
            registry.register(moved_prompt(backbone, name).save(folder / name), name, search.run_id)
            registry.set_alias(name, "champion", 1)
    return Store(folder, write_job(folder), backbone, registry)


@pytest.fixture
def store(made: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Point the verbs at the registry."""
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.folder / "cache"))
    return made


def classified(store: Store, artifact: Path) -> list[dict[str, Any]]:
    return OfflineModel.from_artifact(artifact, store.backbone).classify(
        ["great movie", "spam or ham", "a fox"]
    )


def test_export(store: Store, command: Command, tmp_path: Path) -> None:
    """PEFT runs the exported folder on the same base model; the next step is named."""
    said = command("export", "prompt", tmp_path / "adapter", "--json")
    assert said.code == 0 and said.document == {
        "name": "prompt", "version": 1, "folder": str(tmp_path / "adapter"),
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM", "num_virtual_tokens": P, "base_model": str(model_folder()),
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids, target = [5, 9, 7], [11, 3]
    row = torch.tensor([[*ids, *target[:-1]]])
    prompt = torch.from_numpy(PromptArtifact.load(store.artifact("prompt")).weights.copy())
    with torch.no_grad():
        wanted, _ = store.backbone.teacher_forced(
            store.backbone.prepare([prompt]), [ids], [target], [0]
        )
        got = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -2:]
    torch.testing.assert_close(got, wanted[0], rtol=1e-4, atol=1e-4)
    lines = command("export", "prefix:1", tmp_path / "other").out.splitlines()
    assert lines[0].startswith("prefix:1 is in ") and "PREFIX_TUNING" in lines[0]
    assert (
        lines[1].startswith("next: ")
        and f"orchestrator import {tmp_path}/other --name NAME --job JOB" in lines[2]
    )


def test_what_export_refuses(store: Store, command: Command, tmp_path: Path) -> None:
    """An existing folder, a prompt that PEFT can't express and an unknown model exit with 2.

    Nothing is written.
    """
    taken = command("export", "prompt", tmp_path, "--json")
    assert taken.code == 2 and "exists already" in taken.document["error"]["message"]
    inside = command("export", "inside", tmp_path / "out")
    assert (
        inside.code == 2
        and "places them itself" in inside.err
        and "next: tune a prompt" in inside.err
    )
    absent = command("export", "promt", tmp_path / "out")
    assert absent.code == 2 and "did you mean 'prompt'" in absent.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_export_and_import(store: Store, command: Command, tmp_path: Path, name: str) -> None:
    """An imported export answers like the original.

    It has no metrics, so it does not become champion, even as the first version of its name.
    """
    command("export", name, tmp_path / "adapter")
    said = command(
        "import", tmp_path / "adapter", "--name", f"{name}-again", "--job", store.job, "--json"
    )
    assert said.code == 0, said.err
    assert said.document["model"] == {"name": f"{name}-again", "version": 1, "alias": "challenger"}
    assert (
        said.document["base_model"] == str(model_folder())
        and said.document["num_virtual_tokens"] == P
    )
    artifacts = [store.artifact(name), store.artifact(f"{name}-again")]
    assert classified(store, artifacts[0]) == classified(store, artifacts[1])
    original, again = (PromptArtifact.load(folder) for folder in artifacts)
    for part, tensor in original.tensors.items():
        assert np.array_equal(tensor, again.tensors[part])
    assert again.manifest.data.rows == {"train": 40, "validation": 16, "test": 16}
    assert (
        again.manifest.metrics == {} and again.manifest.base_model == original.manifest.base_model
    )
    shown = command("models", f"{name}-again:1")
    assert (
        shown.code == 0 and str(model_folder()) in shown.out and "imported from PEFT" in shown.out
    )
    second = command("import", tmp_path / "adapter", "--name", f"{name}-again", "--job", store.job)
    assert "Version 2 is not champion" in second.err
    assert second.out.splitlines()[-1] == (
        f"next: orchestrator evaluate {name}-again:2 --data FILE   then   orchestrator "
        f"promote {name}-again 2"
    )
    assert store.registry.aliases(f"{name}-again") == {"challenger": 2}


def test_an_import_is_champion_when_that_is_asked_for(
    store: Store, command: Command, tmp_path: Path
) -> None:
    """Only the command line's option makes an import champion, not a job's setting for searches.

    An import never replaces another champion.
    """
    command("export", "prompt", tmp_path / "adapter")
    asked = ("import", tmp_path / "adapter", "--name", "asked", "--job", store.job, "--json")
    unasked = command(*asked, "--set", "registry.alias=champion")
    assert unasked.document["model"] == {"name": "asked", "version": 1, "alias": None}
    assert store.registry.aliases("asked") == {}
    assert command(*asked, "--alias", "staging").document["model"]["alias"] == "staging"
    assert command(*asked, "--alias", "champion").document["model"] == {
        "name": "asked", "version": 3, "alias": "champion",
    }  # fmt: skip
    again = command(*asked, "--alias", "champion")
    assert (
        again.code == 2 and "version 3 is champion of asked" in again.document["error"]["message"]
    )
    assert "evaluate" in again.document["error"]["next"]
    assert command(*asked, "--alias", "latest").code == 2
    assert store.registry.aliases("asked") == {"staging": 2, "champion": 3}
    assert len(store.registry.versions("asked")) == 3


def peft_made(kind: str, folder: Path) -> Path:
    """Save an untrained PEFT prompt on the base model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    configs = {
        "projected": PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True
        ),
        "encoded": PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=4
        ),
    }
    get_peft_model(model, configs[kind]).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "method"), [("projected", "prefix_tuning"), ("encoded", "p_tuning")]
)
def test_import_of_what_peft_made(
    store: Store, command: Command, tmp_path: Path, kind: str, method: str
) -> None:
    """A PEFT folder becomes a served prompt with the job's template, verbalizer and limits."""
    folder = peft_made(kind, tmp_path / "adapter")
    said = command(
        "import",
        folder,
        "--name",
        kind,
        "--job",
        store.job,
        "--set",
        "data.max_input_tokens=17",
        "--json",
    )
    assert said.code == 0, said.err
    found = PromptArtifact.load(store.artifact(kind)).manifest
    assert (found.method, found.max_input_tokens, found.template) == (method, 17, "{text}\nspam?")
    assert found.verbalizer == VERBALIZER
    assert {row["label"] for row in classified(store, store.artifact(kind))} <= {0, 1}


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
    (folder / ADAPTER_CONFIG).write_text(json.dumps(document))


def test_what_import_refuses(store: Store, command: Command, tmp_path: Path) -> None:
    """Wrong models, folders, prefix shapes, names and jobs exit with 2, nothing registered."""
    before = store.names
    folder = peft_made("projected", tmp_path / "adapter")
    asked = ("import", folder, "--name", "refused", "--job", store.job)
    bad_name = command("import", folder, "--name", "no name", "--job", store.job, "--json")
    assert (
        bad_name.code == 2
        and "can't name a registered model" in bad_name.document["error"]["message"]
    )
    edit(folder, base_model_name_or_path="elsewhere/other")
    other = command(*asked)
    assert (
        other.code == 2
        and "was trained on 'elsewhere/other'" in other.err
        and "--renamed-base-model" in other.err
    )
    width = json.loads((folder / ADAPTER_CONFIG).read_text())["token_dim"]
    # The same number of values, laid out for another model.
    edit(folder, token_dim=width * 2, num_layers=1)
    shape = command(*asked, "--renamed-base-model")
    assert shape.code == 2 and "does not fit this model" in shape.err
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:300])
    cut = command(*asked)
    assert cut.code == 2 and "cut short or altered" in cut.err
    no_job = command("import", folder, "--name", "refused", "--job", tmp_path / "none.yaml")
    assert no_job.code == 2 and "there is no such file" in no_job.err
    assert command("import", folder, "--name", "refused").code == 2
    assert store.names == before


def test_a_renamed_base_model(store: Store, command: Command, tmp_path: Path) -> None:
    """A folder with another model name is imported if the user says that the model is the same."""
    folder = peft_made("encoded", tmp_path / "adapter")
    edit(folder, base_model_name_or_path="elsewhere/other")
    said = command(
        "import", folder, "--name", "renamed", "--job", store.job, "--renamed-base-model"
    )
    assert said.code == 0, said.err


NEIGHBOUR = record(id=COUNT, token={"type": "string"}, distance=NUMBER)
DRIFT = record(cosine=NUMBER, norm=NUMBER, start_norm=NUMBER)
INSPECTED = record(
    name=TEXT, version=COUNT, method=TEXT, num_virtual_tokens=COUNT, base_model=TEXT,
    config={"type": "object"},
    vocabulary_norm=NUMBER, no_drift={"type": "string"},
    tokens={"type": "array", "items": record(
        place=COUNT, norm=NUMBER, nearest={"type": "array", "items": NEIGHBOUR}, drift=DRIFT,
    )},
    layers={"type": "array", "items": record(
        site=TEXT, layer=COUNT, key_norm=NUMBER, value_norm=NUMBER, real_key_norm=NUMBER,
        real_value_norm=NUMBER,
        drift=DRIFT,
    )},
)  # fmt: skip


def test_inspect_a_soft_prompt(store: Store, command: Command) -> None:
    """Each virtual token is shown with its neighbours and its drift from the initial text."""
    said = command("inspect", "prompt", "--nearest", 2, "--json")
    assert said.code == 0, said.err
    jsonschema.validate(said.document, INSPECTED)
    assert [len(token["nearest"]) for token in said.document["tokens"]] == [2] * P
    assert said.document["layers"] == [] and said.document["no_drift"] == ""
    lines = command("inspect", "prompt@champion").out.splitlines()
    assert lines[0] == f"prompt:1: prompt_tuning, {P} virtual tokens of {model_folder()}"
    assert (
        lines[1].split() == ["token", "norm", "cosine", "moved", "nearest"]
        and len(lines) == 2 + P + 3
    )
    assert lines[-1] == "next: orchestrator models prompt:1   or   orchestrator serve prompt:1"


def test_inspect_a_prefix(store: Store, command: Command) -> None:
    """Each layer's keys and values are compared with those of real tokens.

    A prefix has no embeddings that could be compared with words.
    """
    said = command("inspect", "prefix", "--json")
    jsonschema.validate(said.document, INSPECTED)
    assert said.document["tokens"] == [] and [
        layer["layer"] for layer in said.document["layers"]
    ] == [0, 1]
    text = command("inspect", "prefix").out
    assert "real key" in text and "no embeddings" in text


def test_inspect_on_another_model(store: Store, command: Command, tmp_path: Path) -> None:
    """A base model in another place may be named; one with other weights is refused."""
    other = save_model(tmp_path / "model", seed=7)
    said = command("inspect", "prompt", "--base-model", other)
    assert said.code == 2 and "tuned on another base model" in said.err
    assert command("inspect", "prompt", "--base-model", model_folder()).code == 0


def test_the_store_is_what_it_says(store: Store) -> None:
    """The prompts of these tests answer, and their answers differ."""
    answers = [classified(store, store.artifact(name)) for name in METHODS]
    assert len({json.dumps(answer) for answer in answers}) == len(METHODS)
