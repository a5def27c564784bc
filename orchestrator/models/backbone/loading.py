"""Loading of base models: read, freeze, and check that prompts can be tuned exactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput, JobFailed
from orchestrator.models.backbone.base import Backbone
from orchestrator.models.backbone.causal import CausalBackbone
from orchestrator.models.backbone.masked import MaskedBackbone
from orchestrator.models.backbone.seq2seq import Seq2SeqBackbone
from orchestrator.models.backbone.weights import (
    auto_model,
    check_layers,
    check_loaded,
    stored_tensors,
    unusable_config,
    wrong_shapes,
)
from orchestrator.models.source import (
    BaseModelInfo,
    Family,
    ModelSource,
    family_of,
    quiet_transformers,
)
from orchestrator.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKBONES: dict[Family, type[Backbone]] = {
    "causal": CausalBackbone,
    "seq2seq": Seq2SeqBackbone,
    "masked": MaskedBackbone,
}


def make_backbone(model: nn.Module, tokenizer: Tokenizer, info: BaseModelInfo) -> Backbone:
    """Return the frozen backbone of the model's family."""
    return BACKBONES[family_of(model.config)](model, tokenizer, info)


def load_backbone(
    source: ModelSource, device: str | torch.device = "cpu", dtype: str = "auto"
) -> Backbone:
    """Load a checked base model and freeze it.

    Weights come from safetensors only. The model's own code runs only if the source allows remote
    code. Raises BadInput when prompts can't be tuned on the model.
    """
    backbone = read_backbone(source, device, dtype)
    check_exact(backbone)
    return backbone


def read_backbone(
    source: ModelSource,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    before_gather: Callable[[], object] | None = None,
) -> Backbone:
    """Load and freeze a base model without trying it out.

    With ``before_gather``, the blocks are sharded among the workers of torch's process group, each
    of which calls this function. Nothing is communicated yet.
    """
    # The fingerprint finds missing and damaged files before anything large is built.
    fingerprint = weights_fingerprint(source)
    device = torch.device(device)
    # A model that gets sharded goes to the device block by block.
    model = _load_model(
        source, _dtype(dtype, device), device if before_gather is None else torch.device("cpu")
    )
    check_loaded(source, model)
    backbone = make_backbone(model, source.tokenizer(), source.info(fingerprint))
    if before_gather is not None:
        backbone.shard(device, before_gather)
    return backbone


def check_exact(backbone: Backbone) -> None:
    """Raise BadInput when prompts can't be tuned on the model.

    The workers of a sharded model call this function together.
    """
    backbone.gather_once()
    if reason := why_not_exact(backbone):
        raise BadInput(
            f"base_model.id {backbone.info.id!r} can't be tuned: {reason}",
            "choose another language model",
        )


@torch.inference_mode()
def why_not_exact(backbone: Backbone) -> str:
    """Return why prompts can't be tuned on this model, or an empty string.

    The model is tried out on two rows that differ in their last token.
    """
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(backbone.table)) if token not in special]
    ids = torch.tensor(ordinary[:10], device=backbone.device).view(2, 5)
    ids[1, :-1] = ids[0, :-1]
    mask = torch.ones_like(ids)
    decoder = {"decoder_input_ids": ids[:, :2]} if backbone.family == "seq2seq" else {}
    logits = backbone.model(input_ids=ids, attention_mask=mask, **decoder).logits
    embedded = backbone.model(
        inputs_embeds=backbone.embed(ids), attention_mask=mask, **decoder
    ).logits
    scale = float(logits.abs().max())
    # Within one forward, a causal model's two rows agree bit for bit before the last token. Two
    # forwards may differ by rounding.
    if (
        backbone.family == "causal"
        and float((logits[0, :-1] - logits[1, :-1]).abs().max()) > 1e-3 * scale
    ):
        return "what it predicts depends on the tokens that come later, so it is not causal"
    if _differs(logits, embedded, scale):
        return "it looks at token ids besides their embeddings, and virtual tokens have none"
    if isinstance(backbone, MaskedBackbone) and _differs(
        _headed(backbone, ids, mask), logits, scale
    ):
        return "its head is not one module on top of its body"
    return ""


def _differs(first: Tensor, second: Tensor, scale: float) -> bool:
    return float((first - second).abs().max()) > 1e-2 * scale


def _headed(backbone: MaskedBackbone, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = backbone.head(
        backbone.body(input_ids=ids, attention_mask=mask).last_hidden_state
    )
    return logits


def _load_model(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    quiet_transformers()
    try:
        model, loading = auto_model(family_of(source.config)).from_pretrained(
            source.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=source.allow_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # transformers' own error would not name the tensors
            **_quantized(source, device),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise source.unusable_weights(error) from None
    except AssertionError as error:
        raise unusable_config(source, error) from None
    if mismatched := {
        name: (stored_shape, config_shape)
        for name, stored_shape, config_shape in sorted(loading["mismatched_keys"])
    }:
        raise wrong_shapes(source, mismatched)
    check_layers(source, model, loading["unexpected_keys"], [])
    # transformers fills missing weights with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise source.unusable_weights(
            f"{len(missing)} weights are missing, the first is {missing[0]}"
        )
    if source.quantization == "none" and not _stored_quantized(source):
        return model.to(device)
    for module in model.modules():
        # On CPUs bitsandbytes repacks 4-bit weights for inference, and later gradients come out
        # wrong (seen in 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _stored_quantized(source: ModelSource) -> bool:
    """Return whether the stored weights are quantised already."""
    return getattr(source.config, "quantization_config", None) is not None


def _quantized(source: ModelSource, device: torch.device) -> dict[str, Any]:
    """Return the loading options that quantise linear layers as they are read.

    Weights are rounded to 8 bits (Dettmers et al. 2022) or to 4-bit normal floats (Dettmers et al.
    2023). Quantised weights can't be moved, so they are read straight to the device.
    """
    quantization = source.quantization
    if quantization == "none":
        return {"device_map": {"": device}} if _stored_quantized(source) else {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "int8",
        load_in_4bit=quantization == "int4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else "auto"


def weights_fingerprint(source: ModelSource) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of the weights as stored.

    The fingerprint does not depend on how the weights are split into files.
    """
    from safetensors import safe_open

    tensors = {name: stored.file for name, stored in stored_tensors(source).items()}
    digest = hashlib.sha256()
    opened_files: dict[Path, safe_open] = {
        file: safe_open(file, framework="pt") for file in set(tensors.values())
    }
    for name in sorted(tensors):
        tensor = opened_files[tensors[name]].get_tensor(name).contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def default_device() -> torch.device:
    """Return this process's accelerator if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_for(gpus: float, setting: str = "") -> torch.device:
    """Return the device of a process to which Ray gave ``gpus`` GPUs.

    Without GPUs from Ray, the device is the CPU even if torch sees GPUs: Ray may or may not hide
    GPUs that belong to other processes. ``setting`` names the setting that asked for GPUs. With it,
    raises JobFailed when torch can't use them.
    """
    device = default_device() if gpus else torch.device("cpu")
    if setting and gpus and device.type == "cpu":
        raise JobFailed(
            f"{setting}: {gpus:g}: torch {torch.__version__} sees none of the GPUs that Ray counts "
            "here",
            f"install a torch for these GPUs and their driver on each node, or set {setting}: 0",
        )
    return device


def set_threads(count: int) -> None:
    """Set the number of threads of torch and OpenMP.

    Ray sets OMP_NUM_THREADS from the CPUs that a worker asks for, but torch may have read another
    value before.
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
