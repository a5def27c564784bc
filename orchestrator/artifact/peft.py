"""Export and import of PEFT's adapter folders.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, no pickle. PEFT stores a
single tensor, ``prompt_embeddings``, whatever the method: for prompt tuning and P-tuning the
virtual tokens [P, H] as they enter the model, for prefix tuning (with a projection too) keys and
values [P, L x 2 x kv heads x head width]. Template, target and verbalizer are not part of it.

A folder is refused where PEFT computes something else than this project, since predictions would
differ (tests/test_peft_agreement.py measures the differences): prefixes of encoder-decoder and of
masked models, and virtual tokens inside a template. This module imports no torch.

Shapes: P virtual tokens, H width of the embeddings, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from orchestrator.artifact import (
    IMPORTED,
    MAX_WEIGHTS_BYTES,
    SOFT,
    BaseModelRecord,
    CellsRecord,
    ChatRecord,
    DataRecord,
    Manifest,
    PromptArtifact,
    VerbalizerEntry,
)
from orchestrator.data.template import Template
from orchestrator.errors import BadInput
from orchestrator.job.spec import SpecialTokens
from orchestrator.models.adapter_folder import ADAPTER_CONFIG, MAX_CONFIG_BYTES, instead_of_adapter
from orchestrator.models.source import Family, looks_like_path, usual_family
from orchestrator.utils.atomic import whole_folder
from orchestrator.utils.text import first_fault

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
README = "README.md"
TENSOR = "prompt_embeddings"
DECODER = "prefix.decoder"

TASK_TYPES: dict[Family, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    # PEFT has no task type for masked models; this one leaves the head alone.
    "masked": "FEATURE_EXTRACTION",
}
METHODS = {
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
}
DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class PeftConfig(BaseModel):
    """The keys of ``adapter_config.json`` that we read; PEFT's other keys are about training."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    peft_type: Literal["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"]
    num_virtual_tokens: int = Field(ge=1)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    token_dim: int | None = Field(default=None, ge=1)
    num_layers: int | None = Field(default=None, ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_transformer_submodules: int | None = Field(default=None, ge=1, le=2)

    @property
    def is_prefix(self) -> bool:
        return self.peft_type == "PREFIX_TUNING"


@dataclass(frozen=True)
class PeftPrompt:
    """A folder's prompt: float32 ``tensors``, named as in an artifact, and PEFT's configuration."""

    method: str
    tensors: dict[str, np.ndarray]
    config: PeftConfig


# Export


def export_peft(artifact: PromptArtifact, folder: Path, readme: str = "") -> Path:
    """Write the artifact as a PEFT folder, completely or not at all.

    On rows without padding PEFT then makes the same predictions. P-tuning is written as prompt
    tuning of the embeddings that its network generated. ``readme`` is the text of the folder's
    README.md; without one there is no such file. Raises BadInput for a prompt that PEFT can't
    express, and for a folder that exists.
    """
    family = usual_family(artifact.manifest.base_model.model_type)
    _check_expressible(artifact, family)
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} exists already", "name a folder that does not exist yet")
    prefix = artifact.tensors.get(DECODER)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": artifact.manifest.base_model.id,
        "inference_mode": True,
        # PEFT's default for encoder-decoders doubles the prompt and uses only one half.
        "num_transformer_submodules": 1,
        "num_virtual_tokens": artifact.manifest.num_virtual_tokens,
        "revision": artifact.manifest.base_model.revision,
        "task_type": TASK_TYPES[family],
        **(_soft_config(artifact.weights) if prefix is None else _prefix_config(prefix)),
    }
    if prefix is None:
        tensor = artifact.weights
    else:
        tensor = prefix.transpose(3, 0, 1, 2, 4).reshape(prefix.shape[3], -1)
    try:
        with whole_folder(folder) as staging:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (staging / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
            save_file(
                {TENSOR: np.ascontiguousarray(tensor)}, staging / WEIGHTS, metadata={"format": "pt"}
            )
            if readme:
                (staging / README).write_text(readme, encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{folder} can't be written ({error.strerror})", "name a folder that you may write to"
        ) from None
    return folder


def _soft_config(weights: np.ndarray) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "token_dim": weights.shape[1],
        # PEFT takes these from the model, and needs neither.
        "num_layers": None,
        "num_attention_heads": None,
    }


def _prefix_config(prefix: np.ndarray) -> dict[str, Any]:
    layers, _, heads, _, width = prefix.shape
    return {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": heads * width,
        "token_dim": heads * width,
        "num_layers": layers,
        "num_attention_heads": heads,
    }


def _check_expressible(artifact: PromptArtifact, family: Family) -> None:
    manifest = artifact.manifest
    if Template(manifest.template).places_virtual_tokens:
        raise BadInput(
            "PEFT puts virtual tokens in front of an input, and the template "
            f"{manifest.template!r} places them itself",
            "tune a prompt with a template without {*} to export it",
        )
    if manifest.method == "prefix_tuning" and (
        family != "causal" or set(artifact.tensors) != {DECODER}
    ):
        raise BadInput(
            f"the prefix of a {manifest.base_model.model_type} model can't be written for PEFT: "
            f"{_OTHERWISE[family]}",
            "export a prompt of prompt_tuning or p_tuning, or a prefix of a causal model",
        )


_OTHERWISE: dict[Family, str] = {
    "causal": "it has one kind of attention in each layer",
    "seq2seq": (
        "PEFT leaves out the encoder and the cross-attention and gives decoder layers each "
        "other's values"
    ),
    "masked": "PEFT moves the positions of the input behind the prefix",
}


# Import


def is_peft(folder: Path) -> bool:
    """Tell whether the folder claims to be a PEFT folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_is_prompt(folder: Path) -> None:
    """Refuse a folder of several prompts, or of a model, where one prompt is expected."""
    if not is_peft(folder) and (misplaced := instead_of_adapter(folder)):
        raise BadInput(f"{folder} {misplaced.what}", misplaced.step)


def read_peft(folder: Path) -> PeftPrompt:
    """Read and check a folder written by PEFT's ``save_pretrained``. BadInput names the fault."""
    check_is_prompt(folder)
    config = _read_config(folder)
    _check_defined(folder, config)
    tensor = _read_tensor(folder)
    if config.is_prefix:
        return PeftPrompt(
            METHODS[config.peft_type], {DECODER: _keys_values(folder, config, tensor)}, config
        )
    tokens = config.num_virtual_tokens
    stored = tokens * (config.num_transformer_submodules or 1)
    if tensor.ndim != 2 or len(tensor) != stored or config.token_dim not in (None, tensor.shape[1]):
        width = config.token_dim or "width"
        raise _broken(
            folder,
            f"{TENSOR} has shape {list(tensor.shape)}, {ADAPTER_CONFIG} says {[stored, width]}",
        )
    # For an encoder-decoder PEFT may store two halves, and uses only the first.
    return PeftPrompt(METHODS[config.peft_type], {SOFT: tensor[:tokens]}, config)


@dataclass(frozen=True)
class ImportedTask:
    """What a manifest says about a prompt's task, which PEFT's folders do not store."""

    base_model: BaseModelRecord
    template: str
    target: str
    verbalizer: tuple[VerbalizerEntry, ...] | None
    max_input_tokens: int
    max_target_tokens: int
    data: DataRecord
    cells: CellsRecord = CellsRecord()  # noqa: RUF009 - a frozen record
    sentinel: bool = False
    chat: ChatRecord | None = None
    special_tokens_in_text: SpecialTokens = "text"


def import_peft(
    folder: Path, task: ImportedTask, orchestrator_version: str, *, renamed: bool = False
) -> PromptArtifact:
    """Read a PEFT folder as an artifact for a task.

    ``renamed`` accepts a folder that gives its base model another name. Raises BadInput for a
    folder that is broken, was trained on another base model or has another width.
    """
    prompt = read_peft(folder)
    if not renamed:
        _check_base_model(folder, prompt, task.base_model)
    _check_width(folder, prompt, task.base_model)
    if Template(task.template).places_virtual_tokens:
        raise BadInput(
            f"PEFT's virtual tokens stand in front of the input, and data.template "
            f"{task.template!r} places them itself",
            "write the template without {*}",
        )
    manifest = Manifest(
        **vars(task),
        method=prompt.method,
        num_virtual_tokens=prompt.config.num_virtual_tokens,
        config={IMPORTED: prompt.config.model_dump(exclude_none=True)},
        metrics={},
        baselines={},
        steps=0,
        search="import",
        trial="import",
        orchestrator_version=orchestrator_version,
    )
    return PromptArtifact(prompt.tensors, manifest)


def _check_base_model(folder: Path, prompt: PeftPrompt, base_model: BaseModelRecord) -> None:
    """Refuse a folder that names another base model."""
    name = prompt.config.base_model_name_or_path or ""
    if not same_name(name, base_model.id):
        raise BadInput(
            f"{folder} was trained on {name!r}, and base_model.id is {base_model.id!r}",
            "set base_model.id to that model; if this is a copy of it, say so with "
            "--renamed-base-model",
        )


def _check_width(folder: Path, prompt: PeftPrompt, base_model: BaseModelRecord) -> None:
    """Refuse virtual tokens whose width is not that of the base model's embeddings."""
    soft = prompt.tensors.get(SOFT)
    if soft is not None and soft.shape[1] != base_model.hidden_size:
        raise BadInput(
            f"{folder} has width {soft.shape[1]}, the embeddings of {base_model.id!r} have "
            f"{base_model.hidden_size}",
            "set base_model.id to the model that it was trained on",
        )


def same_name(named: str, base_model: str) -> bool:
    """Tell whether a folder's base model may be the given one.

    PEFT stores the name by which the model was loaded, or nothing. A hub id and a local folder with
    the same last name count as the same. Weights are not compared, since PEFT stores no digest.
    """
    if not named or named == base_model:
        return True
    folder, base_folder = Path(named).expanduser(), Path(base_model).expanduser()
    if folder.exists() and base_folder.exists():
        return folder.resolve() == base_folder.resolve()
    is_local = looks_like_path(named) or looks_like_path(base_model)
    return is_local and folder.name == base_folder.name


def _read_config(folder: Path) -> PeftConfig:
    try:
        raw = _limited(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
        document = json.loads(raw.decode("utf-8"))
        if isinstance(document, Mapping) and document.get("peft_type") not in list(METHODS):
            raise _broken(
                folder,
                f"its peft_type is {document.get('peft_type')!r}, read are {', '.join(METHODS)}",
            )
        return PeftConfig.model_validate(document)
    except OSError as error:
        raise _broken(folder, f"{ADAPTER_CONFIG} can't be read ({error.strerror})") from None
    except ValidationError as error:
        raise _broken(folder, f"{ADAPTER_CONFIG}: {first_fault(error)}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(folder, f"{ADAPTER_CONFIG} is not JSON ({error})") from None


def _check_defined(folder: Path, config: PeftConfig) -> None:
    """Refuse prefixes that mean something else in PEFT than they would here."""
    if not config.is_prefix or (
        config.task_type == "CAUSAL_LM" and config.num_transformer_submodules != 2
    ):
        return
    doubled = config.task_type == "SEQ_2_SEQ_LM" or config.num_transformer_submodules == 2
    raise BadInput(
        f"{folder} holds a prefix for task_type {config.task_type}, which would mean something "
        "else here: "
        f"{_OTHERWISE['seq2seq' if doubled else 'masked']}",
        "tune it again here, or import a prompt of PROMPT_TUNING or P_TUNING",
    )


def _read_tensor(folder: Path) -> np.ndarray:
    """Return the only tensor, as finite float32."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise _broken(folder, f"it has {PICKLE} and no {WEIGHTS}; pickled weights are not read")
    try:
        tensors = dict(deserialize(_limited(folder / WEIGHTS, MAX_WEIGHTS_BYTES)))
    except OSError as error:
        raise _broken(folder, f"{WEIGHTS} can't be read ({error.strerror})") from None
    except (SafetensorError, ValueError) as error:
        raise _broken(
            folder, f"{WEIGHTS} is not a safetensors file: cut short or altered ({error})"
        ) from None
    if TENSOR not in tensors:
        raise _broken(folder, f"{WEIGHTS} has no {TENSOR}")
    if others := sorted(set(tensors) - {TENSOR}):
        raise _broken(folder, f"it also changes the model itself ({', '.join(others[:3])})")
    tensor = _as_float32(folder, tensors[TENSOR])
    if not np.isfinite(tensor).all():
        raise _broken(folder, f"{TENSOR} holds values that are not finite")
    return tensor


def _as_float32(folder: Path, stored: Mapping[str, Any]) -> np.ndarray:
    kind, data = stored["dtype"], bytes(stored["data"])
    if kind == "BF16":  # the upper half of a float32; numpy has no such type
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif kind in DTYPES:
        with np.errstate(over="ignore"):  # overflows become infinite, which _read_tensor refuses
            values = np.frombuffer(data, DTYPES[kind]).astype(np.float32)
    else:
        raise _broken(folder, f"{TENSOR} is {kind}, expected floating point numbers")
    return values.reshape(stored["shape"])


def _keys_values(folder: Path, config: PeftConfig, tensor: np.ndarray) -> np.ndarray:
    """Reshape [P, L x 2 x kv heads x head width] to [L, 2, kv heads, P, head width]."""
    tokens, layers, heads, width = (
        config.num_virtual_tokens,
        config.num_layers,
        config.num_attention_heads,
        config.token_dim,
    )
    if layers is None or heads is None or width is None or width % heads:
        raise _broken(
            folder,
            f"num_layers {layers}, num_attention_heads {heads} and token_dim {width} describe no "
            "prefix",
        )
    expected = [tokens, layers * 2 * width]
    if list(tensor.shape) != expected:
        raise _broken(
            folder, f"{TENSOR} has shape {list(tensor.shape)}, {ADAPTER_CONFIG} says {expected}"
        )
    split = tensor.reshape(tokens, layers, 2, heads, width // heads)
    return np.ascontiguousarray(split.transpose(1, 2, 3, 0, 4))


def _limited(file: Path, limit: int) -> bytes:
    """Return a file's bytes; ValueError when there are more than any prompt has."""
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def _broken(folder: Path, what: str) -> BadInput:
    return BadInput(f"PEFT folder {folder}: {what}", "write it again with PEFT's save_pretrained")
