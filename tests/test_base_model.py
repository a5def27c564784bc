"""Base models are found or refused by their small files, with the reason and the fix."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import FAMILIES, MASKED, SEQ2SEQ, model_folder, small_config, tiny_tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import load_backbone
from orchestrator.models.source import (
    NO_LIMIT,
    ModelSource,
    family_of,
    looks_like_path,
    resolve_model,
    tokenizer_digest,
    usual_family,
)

REAL = Path(__file__).parents[2] / "shared" / "models"


def resolve(name: Any) -> ModelSource:
    return resolve_model(BaseModelSpec(id=str(name)))


def refused(name: Any, message: str) -> BadInput:
    with pytest.raises(BadInput, match=message) as caught:
        resolve(name)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), BadInput)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder_is_found(folder: Path) -> None:
    """Facts come from the configuration and digests from the files; no weights are read."""
    (folder / "model.safetensors").unlink()
    source = resolve(folder)
    info = source.info("abc")
    assert (info.id, info.revision, info.model_type, info.fingerprint) == (
        str(folder),
        "main",
        "llama",
        "abc",
    )
    assert (info.hidden_size, info.vocab_size, info.context_length) == (
        32,
        len(tiny_tokenizer()),
        160,
    )
    assert info.tokenizer_digest == tokenizer_digest(tiny_tokenizer())
    assert source.tokenizer() is source.tokenizer()


def test_a_relative_folder_and_home_are_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path may be relative or start with ~; the id stays as written."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("./model", "model", "~/model"):
        source = resolve(name)
        assert source.path == folder.resolve() and source.id == name


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    """A name that looks like a path is not looked up on the hub; the error has the full path."""
    assert looks_like_path(name)
    error = refused(name, "does not exist")
    assert (
        f"the folder {Path(name).expanduser().resolve()}" in error.message
        and "builtin:quickstart" in error.hint
    )


def test_a_file_is_no_folder(folder: Path) -> None:
    """A weight file alone is not a model."""
    refused(folder / "model.safetensors", "is a file")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    """The error names the missing file."""
    refused(tmp_path, r"holds no config\.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_configuration_that_can_not_be_read(folder: Path, text: str) -> None:
    """A damaged or unknown configuration is bad input with a one-line message, no traceback."""
    (folder / "config.json").write_text(text)
    error = refused(folder, "can't be read as a model")
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("vit", "ViTForImageClassification"),
        ("bert", "BertForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("bart", "BartForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("clip", None),
    ],
)
def test_other_kinds_of_models(tmp_path: Path, kind: str, architecture: str | None) -> None:
    """Vision models, bare encoders and classifiers are refused, and the error names their kind."""
    config = AutoConfig.for_model(kind)
    config.architectures = architecture and [architecture]
    config.save_pretrained(tmp_path)
    error = refused(tmp_path, f"is not a language model .*'{kind}'")
    assert (architecture or "") in error.message and "Qwen" in error.hint


@pytest.mark.parametrize(
    ("kind", "architecture", "family"),
    [
        ("llama", "LlamaForCausalLM", "causal"),
        ("gpt2", "GPT2LMHeadModel", "causal"),
        ("llama", None, "causal"),
        ("t5", "T5ForConditionalGeneration", "seq2seq"),
        ("bart", None, "seq2seq"),
        ("bert", "BertForMaskedLM", "masked"),
        ("roberta", "RobertaForMaskedLM", "masked"),
        ("roberta", "RobertaForCausalLM", "causal"),
        ("bert", None, "masked"),
    ],
)
def test_the_family_is_read_from_the_configuration(
    tmp_path: Path, kind: str, architecture: str | None, family: str
) -> None:
    """The saved architecture decides the family; without one, the model type does."""
    config = AutoConfig.for_model(kind)
    config.architectures = architecture and [architecture]
    config.save_pretrained(tmp_path)
    source = resolve_model(BaseModelSpec(id=str(tmp_path)), weights=False)
    assert source.family == family


def test_an_unknown_builtin() -> None:
    """The message lists the built-in models."""
    refused(
        "builtin:gpt5",
        r"'builtin:gpt5' is unknown; built-in models are builtin:quickstart, builtin:causal-s, ",
    )


def test_a_hub_name_without_a_network() -> None:
    """Offline, a hub model is unreachable, and the error lists the alternatives.

    A name that is not valid on the hub is bad input all the same.
    """
    code = """
import orchestrator
from orchestrator.models.backbone import load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.errors import OrchestratorError
from orchestrator.job.spec import BaseModelSpec
for name in ("nobody/nothing-of-that-name", "not a name"):
    try:
        resolve_model(BaseModelSpec(id=name))
    except OrchestratorError as error:
        print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    first, hint, second, _ = said.stdout.splitlines()
    assert first.startswith(
        "Unreachable base_model.id 'nobody/nothing-of-that-name' is not in the local cache"
    )
    assert "HF_HUB_OFFLINE is set" in first and "connect to the network" in hint
    assert second.startswith(
        "BadInput base_model.id 'not a name' is neither a folder here nor a model on the hub"
    )


def test_weights_come_from_safetensors_only(folder: Path) -> None:
    """Without *.safetensors the error names the fix, also if there is a pickle.

    Weights in several files are all found.
    """
    source = resolve(folder)
    assert source.weight_files() == [folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        BadInput, match=r"no \*\.safetensors in .*; pickled weights are not read"
    ) as caught:
        source.weight_files()
    assert "safe_serialization=True" in caught.value.hint
    for part in ("model-2.safetensors", "model-1.safetensors"):
        (folder / part).touch()
    assert [file.name for file in source.weight_files()] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


def test_a_tokenizer_without_an_end_token(folder: Path) -> None:
    """A tokenizer needs an end token, because targets end with it."""
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer).save_pretrained(
        folder
    )
    with pytest.raises(BadInput, match=r"no end token(.|\n)*eos_token"):
        resolve(folder).tokenizer()


@pytest.mark.parametrize("text", [None, "", "{}", "not json"])
def test_a_tokenizer_that_can_not_be_read(folder: Path, text: str | None) -> None:
    """Missing or damaged tokenizer files are bad input, on one line."""
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(BadInput, match="has no usable tokenizer") as caught:
        resolve(folder).tokenizer()
    assert "\n" not in caught.value.message


def test_remote_code_is_never_run(folder: Path) -> None:
    """A folder's own code never runs: the folder is refused or loaded without the code."""
    (folder / "modeling_evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n"
    )
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change_config(folder, auto_map=auto)
    resolve(folder)
    change_config(folder, auto_map=auto, model_type="evil")
    assert (
        "allow_remote_code: true"
        in refused(folder, "brings Python code of its own, which is not run").hint
    )
    assert not (folder / "ran").exists()


def test_remote_code_runs_where_the_spec_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the spec allows it, the folder's own model class is loaded and tuned like any other."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
    (folder / "modeling_own.py").write_text(code)
    auto = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_config(folder, auto_map=auto, model_type="own", architectures=["OwnForCausalLM"])
    refused(folder, "brings Python code of its own")
    backbone = load_backbone(resolve_model(BaseModelSpec(id=str(folder), allow_remote_code=True)))
    assert type(backbone.model).__name__ == "OwnForCausalLM" and backbone.family == "causal"


def test_context_length_by_any_name(folder: Path) -> None:
    """The context length is found under each family's key; without a key there is no limit."""
    assert resolve(folder).context_length == 160
    for family, length in [("gpt2", 160), ("opt", 160), ("mamba", NO_LIMIT), ("bloom", NO_LIMIT)]:
        config = AutoConfig.for_model(family, **({"n_positions": 160} if family == "gpt2" else {}))
        if family == "opt":
            config.max_position_embeddings = 160
        config.save_pretrained(folder)
        assert resolve(folder).context_length == length


def test_the_width_is_that_of_the_embeddings(folder: Path) -> None:
    """If embeddings are projected to the hidden size, prompts have the embeddings' width."""
    small_config("opt").save_pretrained(folder)
    assert resolve(folder).info("").hidden_size == 16
    small_config("gpt2").save_pretrained(folder)
    assert resolve(folder).info("").hidden_size == 32


@pytest.mark.parametrize("model_type", [*FAMILIES, *SEQ2SEQ, *MASKED])
def test_the_usual_family_is_the_configurations(model_type: str) -> None:
    """The family derived from the model type alone equals the one from the configuration."""
    assert usual_family(model_type) == family_of(small_config(model_type))


def test_tokenizer_digest_sees_any_change(folder: Path) -> None:
    """Saving and loading keeps the digest; another vocabulary or special token changes it."""
    source = resolve(folder)
    first = tokenizer_digest(source.tokenizer())
    source.tokenizer().save_pretrained(folder.parent / "again")
    assert (
        tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(folder.parent / "again")) == first
    )
    source.tokenizer().add_tokens(["<new>"])
    assert tokenizer_digest(source.tokenizer()) != first


@pytest.mark.parametrize("name", ["stories3M", "stories260K"])
def test_real_models(name: str) -> None:
    """Small published models are found and loaded, and report their facts."""
    if not (REAL / name / "config.json").is_file():
        pytest.skip(f"needs the model in {REAL / name}")
    from orchestrator.models.backbone import load_backbone

    backbone = load_backbone(resolve(REAL / name))
    assert backbone.info.model_type == "llama" and backbone.prompt_once
    assert backbone.info.hidden_size == backbone.table.shape[1]
    assert len(backbone.info.fingerprint) == 64
