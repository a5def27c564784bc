"""Check a local base model's folder from its files, quickly and without torch or transformers.

Checks that need a library, such as whether the tokenizer works, run when a job is prepared.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import BadInput
from orchestrator.job.spec import BUILTIN, BaseModelSpec
from orchestrator.models.adapter_folder import ADAPTER_CONFIG, MODEL_CONFIG
from orchestrator.models.builtin import builtin_has_chat_template
from orchestrator.models.source import ENDINGS, MODEL_HINT, ModelSource, local_folder
from orchestrator.utils.documents import JsonObject

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
AGAIN = "fetch or save the model again"
HEADER_BYTES = 8  # a safetensors file starts with the length of its header in 8 bytes


def folder_faults(spec: BaseModelSpec) -> Iterator[BadInput]:
    """Find the faults of the folder that ``base_model.id`` names."""
    try:
        folder = local_folder(spec.id)
        config = _config(spec, folder)
    except BadInput as error:
        yield error
        return
    if not _may_be_language_model(spec, config):
        yield BadInput(
            f"base_model.id {spec.id!r} is not a language model (model_type "
            f"{config.get('model_type')!r}, architectures {config['architectures']})",
            MODEL_HINT,
        )
        return
    yield from _tokenizer_faults(spec, folder)
    yield from _weight_faults(spec, folder)


def names_chat_template(spec: BaseModelSpec) -> bool | None:
    """Tell whether a model has a chat template, by its files on this machine.

    Returns None for a model whose tokenizer is not here, and for an unknown built-in model.
    """
    if spec.source == "builtin":
        return builtin_has_chat_template(spec.id.removeprefix(BUILTIN))
    folder = Path(spec.id).expanduser() if spec.source == "folder" else _cached(spec)
    if not folder or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    if (folder / CHAT_TEMPLATE).is_file():
        return True
    try:
        config = json.loads((folder / TOKENIZER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _cached(spec: BaseModelSpec) -> Path | None:
    """Return the folder of a model's small files in the hub's cache, or a folder here."""
    if spec.source == "builtin":
        return None
    if Path(spec.id).expanduser().is_dir():
        return Path(spec.id).expanduser()
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(spec.id, TOKENIZER_CONFIG, revision=spec.revision)
    except ValueError:  # the id is none of the hub's
        return None
    return Path(file).parent if isinstance(file, str) else None


def _config(spec: BaseModelSpec, folder: Path) -> JsonObject:
    if not (folder / MODEL_CONFIG).is_file():
        raise BadInput(
            f"base_model.id {spec.id!r}: {folder} holds no {MODEL_CONFIG}",
            _hint_without_config(folder),
        )
    config = _json(spec, folder / MODEL_CONFIG)
    if not isinstance(config, dict):
        raise BadInput(
            f"base_model.id {spec.id!r}: {folder / MODEL_CONFIG} is not a JSON object", AGAIN
        )
    return config


def _hint_without_config(folder: Path) -> str:
    """Suggest the base model of an adapter, or the models inside a folder of models."""
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            base = json.loads((folder / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its base model"
        return (
            f"it is an adapter: set base_model.id to {base}, and import it or start from it as an "
            "artifact"
        )
    models = sorted(file.parent.name for file in folder.glob(f"*/{MODEL_CONFIG}"))
    if models:
        return f"name one of the models in it: {', '.join(models[:5])}"
    return MODEL_HINT


def _may_be_language_model(spec: BaseModelSpec, config: JsonObject) -> bool:
    """Return whether the names of the architectures allow for a language model.

    The names are enough to refuse a classifier or an image model.
    """
    architectures = config.get("architectures")
    if spec.allow_remote_code or not isinstance(architectures, list) or not architectures:
        return True
    endings = tuple(ending for family in ENDINGS.values() for ending in family)
    return any(str(name).endswith(endings) for name in architectures)


def _tokenizer_faults(spec: BaseModelSpec, folder: Path) -> Iterator[BadInput]:
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not names:
        yield BadInput(
            f"base_model.id {spec.id!r}: {folder} holds no tokenizer, which has files such as "
            "tokenizer.json",
            "save the model's tokenizer beside it: tokenizer.save_pretrained(FOLDER)",
        )
    for name in names:
        try:
            _read(spec, folder / name)
        except BadInput as error:
            yield error


def _read(spec: BaseModelSpec, file: Path) -> None:
    if file.suffix == ".json":
        _json(spec, file)
    else:
        _bytes(spec, file)


def _bytes(spec: BaseModelSpec, file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BadInput(
            f"base_model.id {spec.id!r}: {file} can't be read ({error.strerror})", AGAIN
        ) from None
    if not content:
        raise BadInput(f"base_model.id {spec.id!r}: {file} is empty", AGAIN)
    return content


def _json(spec: BaseModelSpec, file: Path) -> Any:
    content = _bytes(spec, file)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"base_model.id {spec.id!r}: {file} is not JSON: {error}", AGAIN) from None


def _weight_faults(spec: BaseModelSpec, folder: Path) -> Iterator[BadInput]:
    try:
        files = ModelSource(spec.id, spec.revision, folder).weight_files()
        missing = _missing_shards(spec, folder)
    except BadInput as error:
        yield error
        return
    if missing:
        yield BadInput(
            f"base_model.id {spec.id!r}: {INDEX} names {', '.join(missing[:5])}, which {folder} "
            "lacks",
            AGAIN,
        )
    for file in files:
        if reason := _broken_weights(file):
            yield BadInput(f"base_model.id {spec.id!r}: {file} {reason}", AGAIN)


def _missing_shards(spec: BaseModelSpec, folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return []
    document = _json(spec, index)
    try:
        names = set(document["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"base_model.id {spec.id!r}: {index} has no weight_map", AGAIN) from None
    return sorted(str(name) for name in names if not (folder / str(name)).is_file())


def _broken_weights(file: Path) -> str:
    """Return the fault of a safetensors file, or "" if the file is as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(HEADER_BYTES))
            header = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
    except OSError as error:
        return f"can't be read ({error.strerror})"
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        struct.error,
    ):
        return "has no header of a safetensors file: it was cut short, or is another file"
    expected = HEADER_BYTES + length + max(ends, default=0)
    if size == expected:
        return ""
    return f"has {size} bytes, its header says {expected}: it was cut short or altered"
