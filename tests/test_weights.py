"""Unusable weights are refused: by the driver where possible, else by the worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    FAMILIES,
    MASKED,
    SEQ2SEQ,
    load,
    model_folder,
    save_family,
    save_model,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import load_backbone, weights
from orchestrator.models.backbone.weights import check_files, is_finite
from orchestrator.models.source import ModelSource, resolve_model

NAME = "model.layers.1.mlp.up_proj.weight"


def source_of(folder: Path) -> ModelSource:
    return resolve_model(BaseModelSpec(id=str(folder)), weights=False)


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def changed(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str = NAME) -> Path:
    """Change one of the folder's tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    """Change some of the folder's configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ, *MASKED])
def test_sound_weights_of_every_family_pass(tmp_path: Path, family: str) -> None:
    """The files' tensors match the configuration under the names that the family stores."""
    source = source_of(save_family(tmp_path / "model", family))
    check_files(source)
    names = weights._names_in_model(weights.empty_model(source), weights.stored_tensors(source))
    assert len(names) >= len(weights.stored_tensors(source)) / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    """Driver and worker both name the tensor and the count of bad numbers."""
    folder = changed(copied(tmp_path), lambda tensor: poisoned(value)(tensor).to(dtype))
    wanted = rf"the weights are not finite.*: 1 of the 2048 numbers of {NAME} are NaN or infinite"
    with pytest.raises(BadInput, match=wanted):
        check_files(source_of(folder))
    with pytest.raises(BadInput, match=wanted):
        load(folder)


def test_numbers_beyond_a_smaller_dtype_are_refused(tmp_path: Path) -> None:
    """Weights that are finite as stored may overflow when the worker casts them."""
    folder = changed(copied(tmp_path), poisoned(1e6))
    check_files(source_of(folder))
    with pytest.raises(
        BadInput, match=f"the weights are not finite in float16: 1 of the 2048 numbers of {NAME}"
    ):
        load_backbone(source_of(folder), dtype="float16")


def test_large_weights_are_left_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver only reads the values of small files; shapes are in the files' headers."""
    monkeypatch.setattr(weights, "READ_AT_MOST", 1000)
    folder = changed(copied(tmp_path), poisoned(float("nan")))
    check_files(source_of(folder))
    with pytest.raises(BadInput, match="not finite"):
        load(folder)
    with pytest.raises(BadInput, match=r"config.json disagrees"):
        check_files(source_of(configured(folder, intermediate_size=80)))


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        (
            "intermediate_size",
            80,
            r"model.layers.0.mlp.down_proj.weight is \[32, 64\] in the file and \[32, 80\]",
        ),
        (
            "num_key_value_heads",
            4,
            r"model.layers.0.self_attn.k_proj.weight is \[16, 32\] in the file and \[32, 32\]",
        ),
        (
            "vocab_size",
            400,
            r"model.embed_tokens.weight is \[330, 32\] in the file and \[400, 32\]",
        ),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, key: str, value: int, tensor: str
) -> None:
    """The message has a tensor and both shapes; the worker gives the same."""
    folder = configured(copied(tmp_path), **{key: value})
    with pytest.raises(
        BadInput, match=rf"config.json disagrees with the weights: {tensor} by config.json"
    ):
        check_files(source_of(folder))
    with pytest.raises(BadInput, match=r"config.json disagrees with the weights"):
        load(folder)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1, r"layers\.1\.\S+ is in the files, and config.json has fewer layers"),
        (3, r"layers\.2\.\S+ is not in the files, and config.json has as many layers"),
    ],
)
def test_another_number_of_layers_is_refused(tmp_path: Path, layers: int, message: str) -> None:
    """Driver and worker both refuse; transformers would silently drop the surplus layers."""
    folder = configured(copied(tmp_path), num_hidden_layers=layers)
    with pytest.raises(BadInput, match=f"disagrees with the weights: model.{message}"):
        check_files(source_of(folder))
    with pytest.raises(BadInput, match="layers"):
        load(folder)


def test_tensors_that_the_model_does_not_have_do_no_harm(tmp_path: Path) -> None:
    """Buffers of older versions and heads for another task are ignored as before."""
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "score.weight",
        "model.layers.1.old.bias",
    ):
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    check_files(source_of(folder))
    load(folder)


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """A body stored without its head has shorter names, and is still checked."""
    folder = copied(tmp_path)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    configured(folder, architectures=["LlamaForCausalLM"])
    name = "layers.1.mlp.up_proj.weight"
    assert name in load_file(folder / "model.safetensors")
    check_files(source_of(folder))
    with pytest.raises(BadInput, match=rf"{name} is \[3, 3\] in the file and \[64, 32\]"):
        check_files(source_of(changed(folder, lambda _: torch.zeros(3, 3), name)))


def test_names_that_transformers_changes_are_left_to_the_worker(tmp_path: Path) -> None:
    """Old BERT files call a norm's weights gamma and beta; they load without an error."""
    folder = save_family(tmp_path / "model", "bert")
    file = folder / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
    check_files(source_of(folder))
    load(folder)


def test_a_missing_part_of_split_weights_is_named(tmp_path: Path) -> None:
    """The index lists the files; if one is missing, nothing is started."""
    folder = copied(tmp_path)
    index = {
        "weight_map": {
            NAME: "model-00001-of-00002.safetensors",
            "lm_head.weight": "model.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        BadInput, match=r"index\.json names model-00001-of-00002\.safetensors, not in the folder"
    ):
        check_files(source_of(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json"):
        check_files(source_of(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 330}, r"pad_token_id 330, and the embedding table has 330 rows"),
        ({"hidden_act": "nonsense"}, r"no model can be built from its config\.json"),
        ({"vocab_size": "many"}, r"can't be read as a model"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        check_files(source_of(configured(copied(tmp_path), **changes)))


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "compressed-tensors", "made-up"])
def test_weights_quantised_by_a_missing_library_are_refused(tmp_path: Path, method: str) -> None:
    """The error names method, missing library and fix, from the configuration alone."""
    folder = configured(
        copied(tmp_path), quantization_config={"quant_method": method, "bits": 4, "group_size": 128}
    )
    with pytest.raises(
        BadInput, match=f"its weights are quantised by {method}, which can't be read here"
    ) as refused:
        source_of(folder)
    assert "unquantised version" in refused.value.hint


def test_quantised_weights_can_not_be_quantised_again(tmp_path: Path) -> None:
    """base_model.quantization is refused for weights that are quantised already."""
    pytest.importorskip("bitsandbytes")
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = configured(copied(tmp_path), quantization_config=stored)
    source_of(folder)
    with pytest.raises(
        BadInput, match=r"quantised by bitsandbytes already, and base_model.quantization is int4"
    ):
        resolve_model(BaseModelSpec(id=str(folder), quantization="int4"))


@pytest.mark.parametrize("bits", [4, 8])
def test_stored_quantised_weights_load_where_their_library_is(tmp_path: Path, bits: int) -> None:
    """Stored quantised weights give the numbers of the same model quantised on loading."""
    pytest.importorskip("bitsandbytes")
    whole = save_model(tmp_path / "whole", hidden_size=128, intermediate_size=256)
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=config, device_map={"": "cpu"}
    )
    folder = tmp_path / "stored"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    check_files(source_of(folder))
    stored = load(folder)
    rounded = load_backbone(resolve_model(BaseModelSpec(id=str(whole), quantization=f"int{bits}")))
    with torch.no_grad():
        one, other = (
            made.teacher_forced(None, [[5, 6, 7]], [[8, 9]], [0])[0] for made in (stored, rounded)
        )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("start", "message"), [(400, "starts from token id 400"), (None, "names no token")]
)
def test_a_decoder_starts_from_a_token_of_the_table(
    tmp_path: Path, start: int | None, message: str
) -> None:
    folder = save_family(tmp_path / "model", "t5")
    source_of(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(BadInput, match=message):
        source_of(configured(folder, decoder_start_token_id=start, pad_token_id=None))


def test_only_floating_numbers_are_looked_at() -> None:
    """Integers and empty tensors count as finite."""
    assert is_finite(torch.ones(2, dtype=torch.int8)) and is_finite(torch.zeros(0, 3))
    assert not is_finite(torch.tensor([1.0, float("nan")])) and is_finite(
        torch.tensor(3.0, dtype=torch.bfloat16)
    )


def test_weights_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second search on the same files does not build the model again.

    Changed files are checked again, and refused files are checked every time. An unwritable cache
    changes nothing.
    """
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    folder, built = copied(tmp_path), []
    build = weights.empty_model
    monkeypatch.setattr(
        weights, "empty_model", lambda source: built.append(source.id) or build(source)
    )
    for _ in range(3):
        check_files(source_of(folder))
    assert len(built) == 1
    changed(folder, poisoned(float("nan")))
    for _ in range(2):
        with pytest.raises(BadInput, match="not finite"):
            check_files(source_of(folder))
    assert len(built) == 3
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file" / "cache"))
    check_files(source_of(copied(tmp_path / "again")))
