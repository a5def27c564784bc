"""Backbones: both ways to attach prompts give the model's result for one unpadded row."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    alone,
    alone_nll,
    load,
    model_folder,
    random_ids,
    random_prompts,
    small_config,
    tiny_backbone,
    tiny_model,
)
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from orchestrator.data.encoding import Encoded
from orchestrator.errors import BadInput, JobFailed
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import (
    PROMPT_ONCE_FAMILIES,
    Backbone,
    CausalBackbone,
    Rows,
    device_for,
    runs_prompt_once,
    weights_fingerprint,
    why_not_exact,
)
from orchestrator.models.source import resolve_model
from orchestrator.tuning.step import packed_gradients

PLAIN_FAMILIES = sorted(set(FAMILIES) - PROMPT_ONCE_FAMILIES)
INPUTS = random_ids([9, 1, 4, 14, 4, 7])
TARGETS = random_ids([3, 2, 1, 4, 2, 5], seed=1)
OWNER = [0, 1, 2, 1, 0, 2]  # which prompt stands in front of which row
LENGTHS = [5, 2, 9]
SPLIT = Encoded(INPUTS, TARGETS, [-1] * len(INPUTS))
ROWS_OF = [
    [row for row, owner in enumerate(OWNER) if owner == prompt] for prompt in range(len(LENGTHS))
]


def precision(family: str) -> tuple[torch.dtype, float, float]:
    """Number format and tolerances for logits and gradients."""
    # transformers' eager attention sums in float32 and turns a float64 mask into NaN there.
    return (
        (torch.float32, 2e-3, 2e-3)
        if family in ("gemma2", "bloom")
        else (torch.float64, 1e-6, 2e-6)
    )


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=tolerance, atol=tolerance * float(wanted.abs().max())
    )


def reference(backbone: Backbone, prompts: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Return each prompt's loss and gradient, computed one row at a time."""
    losses, gradients = [], []
    for prompt, rows in zip(prompts, ROWS_OF, strict=True):
        leaf = prompt.detach().clone().requires_grad_()
        nll = sum(alone_nll(backbone, leaf, INPUTS[row], TARGETS[row]) for row in rows)
        loss = nll / sum(len(TARGETS[row]) for row in rows)
        loss.backward()
        losses.append(float(loss))
        gradients.append(leaf.grad)
    return losses, gradients


def check_equals_rows_alone(
    backbone: Backbone, logits_tolerance: float, gradient_tolerance: float
) -> None:
    prompts = random_prompts(backbone, LENGTHS)
    with torch.no_grad():
        logits, _ = backbone.teacher_forced(backbone.prepare(prompts), INPUTS, TARGETS, OWNER)
        for row, (ids, target) in enumerate(zip(INPUTS, TARGETS, strict=True)):
            close(
                logits[row, -len(target) :],
                alone(backbone, prompts[OWNER[row]], ids, target),
                logits_tolerance,
            )
    losses = packed_gradients(backbone, prompts, ROWS_OF, SPLIT)
    wanted_losses, wanted_gradients = reference(backbone, prompts)
    assert losses == pytest.approx(wanted_losses, rel=gradient_tolerance)
    for prompt, wanted in zip(prompts, wanted_gradients, strict=True):
        assert prompt.grad is not None
        close(prompt.grad, wanted, gradient_tolerance)


@pytest.mark.parametrize("family", sorted(PROMPT_ONCE_FAMILIES))
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_prompt_once_and_concatenation_equal_rows_alone(family: str, prompt_once: bool) -> None:
    """Both ways equal single unpadded rows in logits, loss and gradient, for checked families."""
    dtype, logits_tolerance, gradient_tolerance = precision(family)
    backbone = tiny_backbone(family, dtype, prompt_once)
    assert runs_prompt_once(backbone.model.config)
    check_equals_rows_alone(backbone, logits_tolerance, gradient_tolerance)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_other_families_take_the_plain_path_and_equal_rows_alone(family: str) -> None:
    """Families off the prompt-once path use concatenation and give exact results.

    They have sliding windows, recurrence, scaled embeddings or no position ids.
    """
    dtype, logits_tolerance, gradient_tolerance = precision(family)
    backbone = tiny_backbone(family, dtype)
    assert not backbone.prompt_once
    check_equals_rows_alone(backbone, logits_tolerance, gradient_tolerance)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "mistral", "qwen2 with a window", "gemma3_text", "mamba", "bloom"]
)
def test_without_a_prompt_rows_equal_rows_alone(family: str) -> None:
    """Without a prompt (the baseline), padding neither shows in the logits nor shifts a window."""
    if family == "qwen2 with a window":
        config = small_config(
            "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double()
        backbone = CausalBackbone(model, None, tiny_backbone().info)
        assert not backbone.prompt_once
    else:
        backbone = tiny_backbone(family, precision(family)[0])
    with torch.no_grad():
        logits, _ = backbone.teacher_forced(None, INPUTS, TARGETS, [0] * len(INPUTS))
        for row, (ids, target) in enumerate(zip(INPUTS, TARGETS, strict=True)):
            close(
                logits[row, -len(target) :],
                alone(backbone, None, ids, target),
                2e-3 if family == "bloom" else 1e-6,
            )


def test_what_keeps_a_model_off_the_prompt_once_path() -> None:
    """Unchecked families, a sliding window in any layer, and ALiBi rule out the fast path."""
    assert runs_prompt_once(small_config("qwen2", use_sliding_window=False, sliding_window=8))
    assert not runs_prompt_once(
        small_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    )
    window = {"use_sliding_window": True, "sliding_window": 8}
    # Windows only from layer 2 on, and the model has two layers.
    assert runs_prompt_once(small_config("qwen2", **window, max_window_layers=2))
    assert not runs_prompt_once(small_config("mistral", sliding_window=4096))
    assert not runs_prompt_once(small_config("falcon", alibi=True))
    assert not runs_prompt_once(small_config("bloom"))


@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_both_ways_equal_peft(family: str, prompt_once: bool) -> None:
    """On unpadded rows PEFT's prompt tuning gives the same logits, loss and prompt gradient."""
    backbone = tiny_backbone(family, prompt_once=prompt_once)
    (prompt,) = random_prompts(backbone, [6])
    tokens = sum(map(len, TARGETS))
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, token_dim=backbone.table.shape[1]
    )
    peft = get_peft_model(copy.deepcopy(backbone.model), config).double()
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt.data)
    total = 0.0
    for ids, target in zip(INPUTS, TARGETS, strict=True):
        row = torch.tensor([[*ids, *target]])
        labels = torch.tensor([[*[-100] * len(ids), *target]])
        out = peft(input_ids=row, attention_mask=torch.ones_like(row), labels=labels)
        with torch.no_grad():
            logits, _ = backbone.teacher_forced(backbone.prepare([prompt]), [ids], [target], [0])
        close(logits[0], out.logits[0, -len(target) - 1 : -1], 1e-6)
        loss = out.loss * len(target) / tokens
        loss.backward()
        total += float(loss)
    (got,) = packed_gradients(backbone, [prompt], [list(range(len(INPUTS)))], SPLIT)
    assert got == pytest.approx(total, rel=1e-6)
    close(prompt.grad, weight.grad, 2e-6)


@pytest.mark.parametrize("family", sorted(PROMPT_ONCE_FAMILIES))
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_the_head_reads_its_matrix_once(family: str, prompt_once: bool) -> None:
    """The input of the output head is contiguous.

    For a strided view, torch would multiply by the whole matrix once for every row.
    """
    backbone = tiny_backbone(family, prompt_once=prompt_once)
    entered: list[Tensor] = []
    head = backbone.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        packed_gradients(backbone, random_prompts(backbone, LENGTHS), ROWS_OF, SPLIT)
    finally:
        hook.remove()
    assert any(hidden.shape[1] > 1 for hidden in entered) and all(
        hidden.is_contiguous() for hidden in entered
    )


@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_padding_and_company_change_nothing(prompt_once: bool) -> None:
    """A row has the same logits alone and next to longer rows or rows with longer prompts."""
    backbone = tiny_backbone(prompt_once=prompt_once)
    prompts = random_prompts(backbone, LENGTHS)
    with torch.no_grad():
        together, _ = backbone.teacher_forced(backbone.prepare(prompts), INPUTS, TARGETS, OWNER)
        for row, owner in enumerate(OWNER):
            prepared = backbone.prepare([prompts[owner]])
            by_itself, _ = backbone.teacher_forced(prepared, [INPUTS[row]], [TARGETS[row]], [0])
            close(together[row, -len(TARGETS[row]) :], by_itself[0], 1e-9)


def test_pad_tokens_are_never_seen() -> None:
    """The ids in padded positions never affect the result.

    They need not even be tokens that the tokenizer knows.
    """
    backbone = tiny_backbone()
    prepared = backbone.prepare(random_prompts(backbone, [4]))
    rows = Rows.pad([[5, 6, 7, 8, 9], [7]], [0, 0], backbone.device)
    assert rows.ids[1].tolist() == [0, 0, 0, 0, 7]
    other = Rows(rows.ids.where(rows.mask, torch.tensor(99)), rows.mask, rows.prompt)
    with torch.no_grad():
        assert torch.equal(
            backbone.target_logits(prepared, rows, 1), backbone.target_logits(prepared, other, 1)
        )


def test_state_goes_on_token_by_token() -> None:
    """Feeding tokens in pieces after a forward equals one forward of the whole row.

    Rows are dropped and repeated in between.
    """
    backbone = tiny_backbone()
    prompts = random_prompts(backbone, LENGTHS)
    with torch.no_grad():
        state = backbone.run(backbone.prepare(prompts), Rows.pad(INPUTS, OWNER, backbone.device))
        order = [3, 0, 3]
        state = state.select(torch.tensor(order))
        fed = torch.tensor(random_ids([4, 4, 4], seed=5))
        real = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
        first, state = backbone.extend(state, fed[:, :2], real[:, :2])
        second, state = backbone.extend(state, fed[:, 2:], real[:, 2:])
        logits = torch.cat([first, second], dim=1)
        for place, row in enumerate(order):
            count = int(real[place].sum())
            tokens = fed[place, :count].tolist()
            wanted = alone(backbone, prompts[OWNER[row]], INPUTS[row], [*tokens, 2])
            close(logits[place, :count], wanted[1:], 1e-9)
        assert state.positions.tolist() == [2 + 14 + 4, 5 + 9 + 2, 2 + 14 + 4]


def test_prompts_stay_float32_on_a_smaller_backbone() -> None:
    """On a bfloat16 backbone the prompt and its gradient keep float32; only the forward is cast."""
    backbone = tiny_backbone(dtype=torch.bfloat16)
    prompt = torch.randn(3, 32, requires_grad=True)
    packed_gradients(backbone, [prompt], [[0, 1]], SPLIT)
    assert prompt.dtype == prompt.grad.dtype == torch.float32 and prompt.grad.abs().sum() > 0
    assert backbone.prepare([prompt]).tensors[0].dtype == torch.bfloat16


def test_nothing_of_the_backbone_is_trained() -> None:
    """A backbone is in evaluation mode, and its parameters neither require nor get a gradient."""
    backbone = tiny_backbone("gpt2")
    before = backbone.digest()
    packed_gradients(backbone, random_prompts(backbone, [3]), [[0, 1, 2]], SPLIT)
    assert not any(module.training for module in backbone.model.modules())
    assert all(
        not weight.requires_grad and weight.grad is None for weight in backbone.model.parameters()
    )
    assert backbone.digest() == before


def test_digest_sees_a_single_weight() -> None:
    """The digest of the weights in memory changes with any single weight, even a scalar."""
    model = copy.deepcopy(tiny_model("llama"))
    model.register_buffer("scale", torch.tensor(1.0))
    backbone = CausalBackbone(model, None, tiny_backbone().info)
    digests = {backbone.digest()}
    next(model.parameters()).data[3, 3] += 1e-9
    digests.add(backbone.digest())
    model.scale += 1
    digests.add(backbone.digest())
    assert len(digests) == 3


def test_fingerprint_is_of_the_weights_not_of_the_files(tmp_path: Path) -> None:
    """Splitting the weights into files keeps the fingerprint; changing one value changes it."""
    source = resolve_model(BaseModelSpec(id=str(model_folder())))
    tensors = load_tensors((model_folder() / "model.safetensors").read_bytes())
    names = sorted(tensors)
    for part in (0, 1):
        save_file(
            {name: tensors[name] for name in names[part::2]}, tmp_path / f"model-{part}.safetensors"
        )
    split = copy.copy(source)
    object.__setattr__(split, "path", tmp_path)
    assert (
        weights_fingerprint(split)
        == weights_fingerprint(source)
        == load(model_folder()).info.fingerprint
    )
    tensors[names[0]].view(-1)[0] += 1
    save_file({name: tensors[name] for name in names[0::2]}, tmp_path / "model-0.safetensors")
    assert weights_fingerprint(split) != weights_fingerprint(source)


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def test_missing_weight_file_is_bad_input(tmp_path: Path) -> None:
    """A folder without *.safetensors is refused, even if it has pickled weights.

    The error says how to convert them.
    """
    folder = copied(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        BadInput,
        match=r"no \*\.safetensors in .*pickled weights are not read(.|\n)*save_pretrained",
    ):
        load(folder)


def test_damaged_weights_are_bad_input(tmp_path: Path) -> None:
    """A truncated file, a missing tensor and a wrong shape are refused.

    No tensor is filled with random numbers instead.
    """
    folder = copied(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_tensors(whole)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"the weights in .* can't be used: model\.safetensors"):
        load(folder)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost},
        weights,
        {"format": "pt"},
    )
    with pytest.raises(BadInput, match=f"1 weights are missing, the first is {lost}"):
        load(folder)
    save_file({**tensors, lost: torch.zeros(3, 3)}, weights, {"format": "pt"})
    wanted = (
        rf"config.json disagrees with the weights: {lost} is \[3, 3\] in the file and \[64, 32\] "
        r"by config.json"
    )
    with pytest.raises(BadInput, match=wanted):
        load(folder)


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    """A BERT without is_decoder is refused: its class is a language model but sees later tokens."""
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    BertLMHeadModel(BertConfig(vocab_size=330, **small)).save_pretrained(tmp_path / "model")
    for file in model_folder().glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    with pytest.raises(BadInput, match="so it is not causal"):
        load(tmp_path / "model")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_passes_the_check(family: str) -> None:
    """All test families are found causal and dependent on their embeddings alone."""
    assert why_not_exact(tiny_backbone(family, torch.float32)) == ""


def test_dtype_follows_the_spec(tmp_path: Path) -> None:
    """auto means float32 on a CPU, whatever dtype is stored; a named dtype is used as given."""
    from orchestrator.models.backbone import load_backbone

    folder = copied(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    source = resolve_model(BaseModelSpec(id=str(folder)))
    assert load_backbone(source).table.dtype == torch.float32
    assert load_backbone(source, dtype="bfloat16").table.dtype == torch.bfloat16


def test_gpus_are_for_those_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_for(0).type, device_for(0.5).type, device_for(2).type) == ("cpu", "cuda", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(1).type == "cpu" and device_for(0, "gpus").type == "cpu"
    with pytest.raises(JobFailed, match=r"gpus: 1: torch .* sees none of the GPUs") as refused:
        device_for(1, "gpus")
    assert "set gpus: 0" in refused.value.hint
