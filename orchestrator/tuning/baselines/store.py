"""Stores a baseline's result as a folder that its library can read.

The folder has PEFT's format for lora and qlora, that of a transformers model for model_tuning and
lomo, and named tensors in a safetensors file for adapter. In every case ``baseline.json`` describes
the result and its metrics; for a written prompt it is the only file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from orchestrator.job.space import TrialSpec
from orchestrator.models.source import ModelSource
from orchestrator.tuning.baselines.lora import lora_config
from orchestrator.utils.atomic import whole_folder

ABOUT = "baseline.json"
STORED = "base_model.model."  # prefix of the names in PEFT's files
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
TORCH = {"format": "pt"}  # transformers does not read a safetensors file without this entry


def save_result(
    folder: Path,
    spec: TrialSpec,
    tensors: Mapping[str, Tensor],
    source: ModelSource,
    about: Mapping[str, Any],
) -> Path:
    """Write the folder completely or not at all; it must not exist yet.

    ``about["method"]`` decides which files are in it.
    """
    method = about["method"]
    cpu_tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    with whole_folder(folder) as staging:
        if method in ("lora", "qlora"):
            _save_lora(staging, spec, cpu_tensors, source)
        elif method in ("model_tuning", "lomo"):
            _save_model(staging, cpu_tensors, source)
        elif method == "adapter":
            save_file(cpu_tensors, staging / "adapter.safetensors", metadata=TORCH)
        text = json.dumps(
            {**about, "config": spec.config()}, indent=2, ensure_ascii=False, default=str
        )
        (staging / ABOUT).write_text(text + "\n", encoding="utf-8")
    return folder


def _save_lora(
    folder: Path, spec: TrialSpec, tensors: Mapping[str, Tensor], source: ModelSource
) -> None:
    """Write the folder as ``PeftModel.from_pretrained`` reads it."""
    targets = sorted({name.rsplit(".", 2)[0] for name in tensors})
    assert spec.rank is not None and spec.alpha is not None  # the spec's own defaults
    config = lora_config(
        source.config.model_type, spec.rank, spec.alpha, targets, TASKS.get(source.family)
    )
    config.base_model_name_or_path, config.revision, config.inference_mode = (
        source.id,
        source.revision,
        True,
    )
    config.save_pretrained(str(folder))
    save_file(
        {STORED + name: tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        TORCH,
    )


def _save_model(folder: Path, tensors: Mapping[str, Tensor], source: ModelSource) -> None:
    """Write a model folder as transformers reads it, tokenizer included."""
    source.config.save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata=TORCH)
