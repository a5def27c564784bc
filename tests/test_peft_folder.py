"""PEFT's folders: both sides predict the same with either's folders; all others are refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MASKED, SEQ2SEQ, backbone_of, random_ids, tiny_model
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from test_artifact import manifest
from torch import Tensor, nn

from orchestrator.artifact import PromptArtifact
from orchestrator.artifact import peft as peft_folder
from orchestrator.artifact.peft import (
    PICKLE,
    WEIGHTS,
    ImportedTask,
    export_peft,
    import_peft,
    is_peft,
    read_peft,
    same_name,
)
from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.adapter_folder import ADAPTER_CONFIG
from orchestrator.models.backbone import Backbone, PromptTensors
from orchestrator.tuning.prompts import InitContext, Method, make_prompt

P = 4
ROWS = list(zip(random_ids([5, 2, 8]), random_ids([2, 3, 1], 1), strict=True))
CAUSAL = ["llama", "gpt2", "opt", "gpt_neox", "mistral", "gemma3_text", "falcon"]
METHODS = {
    "prompt_tuning": Method("prompt_tuning"),
    "prefix_tuning": Method("prefix_tuning", "mlp", 7),
    "p_tuning": Method("p_tuning", "lstm", 6),
}


def artifact_of(family: str, method: str, **changes: Any) -> PromptArtifact:
    """Return a tuned prompt of the family's tiny model, moved off its initial values."""
    backbone = backbone_of(family)
    prompt = make_prompt(
        METHODS[method], TrialSpec("random", None, P, 0.1, 3), InitContext.of(backbone, [])
    )
    generator = torch.Generator().manual_seed(8)
    for parameter in prompt.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tensors = {name: tensor.detach().numpy() for name, tensor in prompt().named().items()}
    base = manifest().base_model.model_copy(
        update={
            "model_type": family,
            "hidden_size": backbone.table.shape[1],
            "vocab_size": len(backbone.table),
        }
    )
    about = {"method": method, "num_virtual_tokens": P, "base_model": base, **changes}
    return PromptArtifact(tensors, manifest(**about))


def our_logits(backbone: Backbone, tensors: dict[str, np.ndarray]) -> list[Tensor]:
    """Return logits [Y, V] of each row."""
    prompt = PromptTensors.from_named(
        {name: torch.from_numpy(array).double() for name, array in tensors.items()}
    )
    with torch.no_grad():
        prepared = backbone.prepare([prompt])
        return [
            backbone.teacher_forced(prepared, [ids], [target], [0])[0][0] for ids, target in ROWS
        ]


def bare(family: str) -> nn.Module:
    """Return a copy of the family's model as another program would load it."""
    model = copy.deepcopy(tiny_model(family)).eval()
    model.set_attn_implementation("sdpa")
    if family in ("gpt2", "opt"):
        # Every tiny configuration sets it, but these families do not have it.
        del model.config.num_key_value_heads
    return model


@torch.no_grad()
def peft_logits(model: nn.Module, backbone: Backbone) -> list[Tensor]:
    found = []
    for ids, target in ROWS:
        fed = [*ids, *target[:-1]]
        more: dict[str, Tensor] = {}
        if backbone.family == "seq2seq":
            fed, more = (
                ids,
                {"decoder_input_ids": torch.tensor([[backbone.start_id, *target[:-1]]])},
            )
        if backbone.family == "masked":
            fed = [*ids, *[backbone.tokenizer.mask_token_id] * len(target)]
        row = torch.tensor([fed])
        found.append(
            model(input_ids=row, attention_mask=torch.ones_like(row), **more).logits[
                0, -len(target) :
            ]
        )
    return found


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


CASES = [
    *((family, method) for family in CAUSAL for method in METHODS),
    *(
        (family, method)
        for family in (*SEQ2SEQ, *MASKED)
        for method in METHODS
        if method != "prefix_tuning"
    ),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_peft_predicts_the_same_with_what_we_write(
    family: str, method: str, tmp_path: Path
) -> None:
    """PeftModel.from_pretrained loads our folder unchanged and gives our logits."""
    artifact, backbone = artifact_of(family, method), backbone_of(family)
    folder = export_peft(artifact, tmp_path / "made" / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == [ADAPTER_CONFIG, WEIGHTS]
    assert folder.stat().st_mode & 0o777 == 0o755
    loaded = PeftModel.from_pretrained(bare(family), str(folder)).double().eval()
    assert_same(peft_logits(loaded, backbone), our_logits(backbone, artifact.tensors))
    assert is_peft(folder) and not is_peft(tmp_path)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_out_and_in_again(family: str, method: str, tmp_path: Path) -> None:
    """Export and import keep the values bit for bit.

    P-tuning is exported without its network and comes back as prompt tuning.
    """
    artifact = artifact_of(family, method)
    found = imported(export_peft(artifact, tmp_path / "adapter"), artifact)
    assert found.tensors.keys() == artifact.tensors.keys()
    for name, tensor in artifact.tensors.items():
        assert np.array_equal(found.tensors[name], tensor)
    assert found.manifest.method == ("prompt_tuning" if method == "p_tuning" else method)
    again = PromptArtifact.load(found.save(tmp_path / "artifact"))
    assert (
        again.manifest.num_virtual_tokens == P
        and again.manifest.template == artifact.manifest.template
    )
    assert (
        again.manifest.config["peft"]["task_type"]
        == peft_folder.TASK_TYPES[backbone_of(family).family]
    )


def imported(folder: Path, like: PromptArtifact, **changes: Any) -> PromptArtifact:
    """Import the folder, with everything that PEFT does not store taken from ``like``."""
    about = like.manifest
    task: dict[str, Any] = {
        "base_model": about.base_model, "template": about.template, "target": about.target,
        "verbalizer": about.verbalizer, "max_input_tokens": about.max_input_tokens,
        "max_target_tokens": about.max_target_tokens, "data": about.data,
    }  # fmt: skip
    renamed = changes.pop("renamed", False)
    return import_peft(folder, ImportedTask(**task | changes), "0", renamed=renamed)


CONFIGS: dict[str, Callable[[str], Any]] = {
    "prompt tuning": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "p-tuning, lstm": lambda task: PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=P,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=6,
    ),
    "p-tuning, mlp": lambda task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_hidden_size=6
    ),
    "prefix tuning": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix tuning, projected": lambda task: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=6
    ),
}
TASKS = {
    **dict.fromkeys(["llama", "gpt2", "mistral"], "CAUSAL_LM"),
    "t5": "SEQ_2_SEQ_LM",
    "bert": "FEATURE_EXTRACTION",
}
TRAINED = [
    (family, kind)
    for family, task in TASKS.items()
    for kind in CONFIGS
    if task == "CAUSAL_LM" or not kind.startswith("prefix")
]


def trained(family: str, kind: str, folder: Path) -> nn.Module:
    """Make a prompt with PEFT, train it for one step, and save it."""
    torch.manual_seed(5)
    model = get_peft_model(bare(family), CONFIGS[kind](TASKS[family])).eval()
    optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=0.1)
    row = torch.tensor([ROWS[0][0]])
    more = {"decoder_input_ids": row} if family in SEQ2SEQ else {}
    model.double()(input_ids=row, attention_mask=torch.ones_like(row), **more).logits.logsumexp(
        -1
    ).sum().backward()
    optimizer.step()
    model.prompt_encoder.float()
    model.save_pretrained(str(folder))
    return model.double()


@pytest.mark.parametrize(("family", "kind"), TRAINED)
def test_we_predict_the_same_with_what_peft_writes(family: str, kind: str, tmp_path: Path) -> None:
    """A folder of PEFT's save_pretrained gives PEFT's logits here.

    For a projection or an LSTM, the folder holds the computed prompt.
    """
    model = trained(family, kind, tmp_path / "adapter")
    method = kind.partition(",")[0].replace("-", "_").replace(" ", "_")
    like = artifact_of(family, "prompt_tuning")
    found = imported(tmp_path / "adapter", like, base_model=like.manifest.base_model)
    assert found.manifest.method == method
    # PEFT ran its network in float64, and stored the outcome in float32.
    for got, wanted in zip(
        our_logits(backbone_of(family), found.tensors),
        peft_logits(model, backbone_of(family)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["t5", "bart", "bert", "roberta"])
def test_prefixes_that_peft_computes_otherwise_are_refused(family: str, tmp_path: Path) -> None:
    """Export and import both refuse, with the reason; nothing is written."""
    with pytest.raises(
        BadInput, match=f"prefix of a {family} model can't be written for PEFT"
    ) as refused:
        export_peft(artifact_of(family, "prefix_tuning"), tmp_path / "out")
    assert refused.value.hint and list(tmp_path.iterdir()) == []
    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "FEATURE_EXTRACTION"
    get_peft_model(bare(family), CONFIGS["prefix tuning"](task)).save_pretrained(
        str(tmp_path / "adapter")
    )
    why = "cross-attention" if family in SEQ2SEQ else "positions"
    with pytest.raises(BadInput, match=f"would mean something else here.*{why}"):
        read_peft(tmp_path / "adapter")


def test_virtual_tokens_inside_a_template_are_refused(tmp_path: Path) -> None:
    """PEFT always puts virtual tokens in front, so export and import both refuse."""
    with pytest.raises(BadInput, match=r"the template '\{text\} \{\*\}' places them itself"):
        export_peft(artifact_of("llama", "prompt_tuning", template="{text} {*}"), tmp_path / "out")
    like = artifact_of("llama", "prompt_tuning")
    folder = export_peft(like, tmp_path / "adapter")
    with pytest.raises(BadInput, match="places them itself"):
        imported(folder, like, template="{*}{text}")


@pytest.mark.parametrize("there", ["an empty folder", "a file", "a dangling link"])
def test_what_exists_is_not_overwritten(there: str, tmp_path: Path) -> None:
    """Existing files, folders and links stay unchanged."""
    place = tmp_path / "out"
    if there == "an empty folder":
        place.mkdir()
    elif there == "a file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists already"):
        export_peft(artifact_of("llama", "prompt_tuning"), place)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk gives a one-line error and leaves no folder, not even a temporary one."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_folder, "save_file", fail)
    with pytest.raises(BadInput, match="No space left on device"):
        export_peft(artifact_of("llama", "prompt_tuning"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Refusals of imports


def edited(**changes: Any) -> Callable[[Path], None]:
    """Set keys of the configuration; a value of ``...`` removes the key."""

    def edit(folder: Path) -> None:
        document = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
        (folder / ADAPTER_CONFIG).write_text(
            json.dumps({key: value for key, value in document.items() if value is not ...})
        )

    return edit


def tensors(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(arrays, folder / WEIGHTS)


def only_a_pickle(folder: Path) -> None:
    torch.save({"prompt_embeddings": torch.ones(P, 32)}, folder / PICKLE)
    (folder / WEIGHTS).unlink()


def spoiled(value: float, dtype: type = np.float32) -> np.ndarray:
    array = np.ones((P, 32), dtype)
    array[2, 3] = value
    return array


GOOD = np.ones((P, 32), np.float32)
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut weights": (lambda folder: os.truncate(folder / WEIGHTS, 200),
        "not a safetensors file: cut short"),
    "empty weights": (lambda folder: os.truncate(folder / WEIGHTS, 0),
        "not a safetensors file: cut short"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"can't be read \(No such file"),
    "a pickle": (only_a_pickle,
        r"adapter_model\.bin and no adapter_model\.safetensors; pickled weights are not read"),
    "another length": (tensors(prompt_embeddings=GOOD[:2]),
        r"shape \[2, 32\], adapter_config.json says \[4, 32\]"),
    "another width": (tensors(prompt_embeddings=GOOD[:, :8].copy()),
        r"shape \[4, 8\], adapter_config.json says"),
    "one dimension": (tensors(prompt_embeddings=np.ones(4, np.float32)), r"shape \[4\]"),
    "nan": (tensors(prompt_embeddings=spoiled(np.nan)), "not finite"),
    "infinity": (tensors(prompt_embeddings=spoiled(-np.inf)), "not finite"),
    "too large for float32": (tensors(prompt_embeddings=spoiled(1e300, np.float64)), "not finite"),
    "integers": (tensors(prompt_embeddings=np.ones((P, 32), np.int32)),
        "is I32, expected floating point"),
    "another tensor": (tensors(lora_A=GOOD), "has no prompt_embeddings"),
    "a tuned head": (tensors(prompt_embeddings=GOOD, classifier=GOOD),
        r"changes the model itself \(classifier\)"),
    "no config": (lambda folder: (folder / ADAPTER_CONFIG).unlink(),
        r"adapter_config\.json can't be read \(No such file"),
    "config cut": (lambda folder: os.truncate(folder / ADAPTER_CONFIG, 50), "is not JSON"),
    "config a list": (lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"),
        r"adapter_config\.json: : Input should be"),
    "config not text": (lambda folder: (folder / ADAPTER_CONFIG).write_bytes(b"\xff\xfe") and None,
        "is not JSON"),
    "config too large": (
        lambda folder: (folder / ADAPTER_CONFIG).write_text(" " * (1 << 20) + "{}") and None,
        "more than",
    ),
    "lora": (edited(peft_type="LORA"),
        "its peft_type is 'LORA', read are PROMPT_TUNING, P_TUNING, PREFIX_TUNING"),
    "no type": (edited(peft_type=...), "its peft_type is None"),
    "a type that is a list": (edited(peft_type=["LORA"]), "its peft_type is"),
    "no length": (edited(num_virtual_tokens=...), r"num_virtual_tokens: Field required"),
    "no tokens": (edited(num_virtual_tokens=0), "num_virtual_tokens: Input should be greater"),
    "length as text": (edited(num_virtual_tokens="4"),
        "num_virtual_tokens: Input should be a valid integer"),
    "three submodules": (edited(num_transformer_submodules=3), "num_transformer_submodules"),
    "a prefix without layers": (
        edited(peft_type="PREFIX_TUNING", num_layers=None),
        "num_layers None, num_attention_heads None and token_dim 32"
    ),
    "a prefix of another shape": (
        edited(peft_type="PREFIX_TUNING", num_layers=2, num_attention_heads=4),
        r"shape \[4, 32\], .* says \[4, 128\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_refused(damage: str, tmp_path: Path) -> None:
    """Reading a bad folder raises an error that names the fault, the file and the fix.

    No other exception escapes.
    """
    harm, message = DAMAGES[damage]
    folder = export_peft(artifact_of("llama", "prompt_tuning"), tmp_path / "adapter")
    harm(folder)
    with pytest.raises(BadInput, match=message) as refused:
        read_peft(folder)
    assert str(folder) in refused.value.message and "save_pretrained" in refused.value.hint


def test_any_cut_of_the_weights_is_refused(tmp_path: Path) -> None:
    """Weights cut at any length are refused, also when the header is still whole."""
    folder = export_peft(artifact_of("llama", "prompt_tuning"), tmp_path / "adapter")
    data = (folder / WEIGHTS).read_bytes()
    for length in range(0, len(data), 13):
        (folder / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(BadInput):
            read_peft(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """Prompts trained in another number format are read as float32, exactly."""
    folder = export_peft(artifact_of("llama", "prompt_tuning"), tmp_path / "adapter")
    stored = torch.from_numpy(load_file(folder / WEIGHTS)["prompt_embeddings"]).to(dtype)
    save_torch({"prompt_embeddings": stored}, folder / WEIGHTS)
    found = read_peft(folder).tensors["prompt"]
    assert found.dtype == np.float32 and np.array_equal(found, stored.float().numpy())


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    """Another name is refused unless the user vouches for it; another width always is."""
    like = artifact_of("llama", "prompt_tuning")
    folder = export_peft(like, tmp_path / "adapter")
    other = like.manifest.base_model.model_copy(update={"id": "other"})
    with pytest.raises(
        BadInput, match=r"was trained on 'tiny', and base_model\.id is 'other'"
    ) as refused:
        imported(folder, like, base_model=other)
    assert "--renamed-base-model" in refused.value.hint
    assert imported(folder, like, base_model=other, renamed=True).manifest.base_model == other
    wide = like.manifest.base_model.model_copy(update={"hidden_size": 64})
    with pytest.raises(BadInput, match="has width 32, the embeddings of 'tiny' have 64"):
        imported(folder, like, base_model=wide, renamed=True)


def test_names_of_one_base_model(tmp_path: Path) -> None:
    """Different names of one model count as the same.

    These are no name, the same name, another path to the folder, and a local copy of a hub model.
    """
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gpt2")
    (tmp_path / "other" / "gpt2").mkdir(parents=True)
    here = str(tmp_path / "gpt2")
    assert (
        same_name("", "gpt2")
        and same_name("a/b", "a/b")
        and same_name(str(tmp_path / "link"), here)
    )
    assert same_name("openai-community/gpt2", here) and same_name("/elsewhere/gpt2", here)
    assert same_name("/elsewhere/gpt2", "openai-community/gpt2")
    assert not same_name("gpt2-medium", here) and not same_name("a/gpt2", "b/gpt2")
    assert not same_name(str(tmp_path / "other" / "gpt2"), here)  # both are here, and they differ


def test_folders_are_read_without_torch() -> None:
    """Reading folders does not import torch, which keeps the command line light."""
    loaded = "'torch' in sys.modules, 'peft' in sys.modules"
    code = f"import sys, orchestrator.artifact.peft; print({loaded})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False False"
