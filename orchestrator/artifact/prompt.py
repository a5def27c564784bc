"""The prompt artifact: weights and a manifest, the only format of trial, registry and serving.

A folder with two files::

    prompt.safetensors   float32 tensors: "prompt" [P, H]; or for a prefix, one tensor for each
                         attention site that it is in: "prefix.decoder", "prefix.encoder",
                         "prefix.cross" [L, 2, kv heads, P, head width]
    manifest.json        everything needed to use the prompt, checked on load

P virtual tokens, H width of the backbone's embeddings, L layers; 2 stands for keys and values. No
pickle, no code, no path that is followed on load. This module imports no torch: registry and
command line read artifacts without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orchestrator.errors import BadInput
from orchestrator.job.labels import Label
from orchestrator.job.spec import PROMPT_METHODS, SpecialTokens
from orchestrator.utils.atomic import whole_folder
from orchestrator.utils.text import first_fault

WEIGHTS = "prompt.safetensors"
MANIFEST = "manifest.json"
FORMAT_VERSION: Literal[1] = 1
MAX_WEIGHTS_BYTES = 1 << 30  # a soft prompt takes kilobytes; a file near this size is none

SOFT = "prompt"
PREFIXES = ("prefix.decoder", "prefix.encoder", "prefix.cross")
IMPORTED = "peft"
"""Key of an imported prompt's configuration. Its value is PEFT's own configuration, as the
origin."""


EARLIER = {"cells": None, "special_tokens_in_text": "parse"}
"""Values of keys in artifacts that were written before these keys existed."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelRecord(Record):
    """The frozen model that a prompt was learned on; the prompt is meaningless on any other."""

    id: str
    revision: str
    model_type: str
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context_length: int = Field(ge=1)
    fingerprint: str
    """sha256 over names, dtypes, shapes and bytes of the weights, as stored."""
    tokenizer_digest: str
    """sha256 over the tokenizer's serialised form."""
    quantization: str = "none"
    """Rounding of the frozen weights while the prompt was learned: none, int8 or int4."""


class VerbalizerEntry(Record):
    label: Label
    text: str


class DataRecord(Record):
    path: str
    fingerprint: str
    """sha256 over the rows of all splits, as used."""
    rows: dict[str, int]
    test_fingerprint: str = ""
    """sha256 over the test rows. Prompts are compared only if these rows are the same. Empty in
    early artifacts."""

    @property
    def place(self) -> str:
        """``path`` in short: for splits with files of their own, their common folder."""
        try:
            paths = json.loads(self.path).values()
            files: list[str] = []
            for entry in paths:
                files += [entry] if isinstance(entry, str) else entry
            return os.path.commonpath(files) or self.path
        except (ValueError, TypeError, AttributeError):  # a single path, or no common folder
            return self.path


class ReparameterizationRecord(Record):
    """The network that generated the prompt during training."""

    type: Literal["none", "mlp", "lstm"] = "none"
    hidden_size: int | None = None


class GenerationRecord(Record):
    """Settings with which evaluations generated texts."""

    max_tokens: int = Field(ge=1)
    num_beams: int = Field(ge=1)


class CellsRecord(Record):
    """The conversion of a row's cells to text.

    Early artifacts lack this record: they wrote ``True`` for a truth value and took null as the
    empty text.
    """

    empty: Literal["refuse", "keep"] = "refuse"
    """Whether a column may be missing, because the prompt was tuned on rows that lacked some."""


class ChatRecord(Record):
    """The base model's chat template, which rows and requests are put into."""

    template_sha256: str
    """sha256 over the chat template. A prompt is not served in another one."""
    system: str | None = None
    """The system message of conversations that have none of their own."""
    messages: str | None = None
    """Column that had the conversations; None if rows were texts, each a turn of the user."""


class Manifest(Record):
    """The information that a prompt needs besides its weights, and its origin."""

    format_version: Literal[1] = FORMAT_VERSION
    method: str
    num_virtual_tokens: int = Field(ge=1)
    config: dict[str, Any]
    """The trial's configuration: init, num_virtual_tokens, learning_rate, seed."""
    reparameterization: ReparameterizationRecord = ReparameterizationRecord()
    template: str
    target: str
    verbalizer: tuple[VerbalizerEntry, ...] | None
    cells: CellsRecord | None = CellsRecord()
    """None in early artifacts."""
    sentinel: bool = False
    """Whether targets begin with the first sentinel token."""
    chat: ChatRecord | None = None
    """None for a prompt that was tuned on bare text."""
    special_tokens_in_text: SpecialTokens = "text"
    """Whether control tokens in rows and requests are read as such (parse) or as texts. Artifacts
    without this key were tuned with parse."""
    max_input_tokens: int = Field(ge=1)
    max_target_tokens: int = Field(ge=1)
    base_model: BaseModelRecord
    data: DataRecord
    metrics: dict[str, dict[str, float]]
    """Metrics by split, e.g. {"test": {"accuracy": 0.97}}."""
    baselines: dict[str, dict[str, dict[str, float]]]
    """Metrics by baseline and split, e.g. {"zero_shot": {"test": {"accuracy": 0.23}}}."""
    generation: GenerationRecord | None = None
    """None where no metric compares generated texts."""
    steps: int = Field(ge=0)
    search: str
    trial: str
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    orchestrator_version: str
    weights_sha256: str = ""

    def verbalizer_map(self) -> dict[Label, str] | None:
        """Return the texts by label, in the manifest's order; None for a generation task."""
        if self.verbalizer is None:
            return None
        return {entry.label: entry.text for entry in self.verbalizer}


class PromptArtifact:
    """A loaded and checked prompt: float32 ``tensors`` by name, and its manifest."""

    def __init__(self, tensors: np.ndarray | Mapping[str, np.ndarray], manifest: Manifest) -> None:
        self.tensors: dict[str, np.ndarray] = (
            {SOFT: tensors} if isinstance(tensors, np.ndarray) else dict(tensors)
        )
        self.manifest = manifest

    @property
    def weights(self) -> np.ndarray:
        """The embeddings of the virtual tokens [P, H]; KeyError for a prefix."""
        return self.tensors[SOFT]

    def save(self, folder: Path) -> Path:
        """Write the artifact completely or not at all; ``folder`` must not exist yet."""
        with whole_folder(folder) as staging:
            tensors = {
                name: np.ascontiguousarray(tensor, dtype=np.float32)
                for name, tensor in self.tensors.items()
            }
            save_file(tensors, staging / WEIGHTS)
            manifest = self.manifest.model_copy(
                update={"weights_sha256": file_sha256(staging / WEIGHTS)}
            )
            (staging / MANIFEST).write_text(
                manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
        return folder

    @classmethod
    def load(cls, folder: Path) -> PromptArtifact:
        """Read an artifact and check its format, digest, shapes, dtypes and finiteness.

        Raises BadInput that names the fault.
        """
        manifest = read_manifest(folder)
        tensors = _read_weights(folder, manifest)
        _check_names(folder, manifest, tensors)
        for name, tensor in tensors.items():
            _check_tensor(folder, manifest, name, tensor)
        return cls(tensors, manifest)


def _check_names(folder: Path, manifest: Manifest, tensors: Mapping[str, np.ndarray]) -> None:
    if manifest.method not in PROMPT_METHODS:
        methods = ", ".join(PROMPT_METHODS)
        raise _broken(folder, f"its method is {manifest.method!r}, this release knows {methods}")
    prefix = manifest.method == "prefix_tuning"
    expected = set(tensors) <= set(PREFIXES) if prefix else set(tensors) == {SOFT}
    if not tensors or not expected:
        allowed = " and ".join(PREFIXES) if prefix else SOFT
        raise _broken(folder, f"{WEIGHTS} holds {sorted(tensors)}, {manifest.method} has {allowed}")


def _check_tensor(folder: Path, manifest: Manifest, name: str, tensor: np.ndarray) -> None:
    shape, length, width = (
        list(tensor.shape),
        manifest.num_virtual_tokens,
        manifest.base_model.hidden_size,
    )
    if name == SOFT and shape != [length, width]:
        raise _broken(folder, f"the prompt has shape {shape}, the manifest says {[length, width]}")
    if name != SOFT and (len(shape) != 5 or shape[1] != 2 or shape[3] != length):
        raise _broken(
            folder,
            f"{name} has shape {shape}, expected [layers, 2, kv heads, {length}, head width]",
        )
    if tensor.dtype != np.float32:
        raise _broken(folder, f"{name} is {tensor.dtype}, expected float32")
    if not np.isfinite(tensor).all():
        raise _broken(folder, f"{name} holds values that are not finite")


def read_manifest(folder: Path) -> Manifest:
    """Read only the manifest, and check it against the format."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError as error:
        raise _broken(folder, f"{MANIFEST} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise _broken(folder, f"{MANIFEST} is not UTF-8 text") from None
    try:
        document = json.loads(text)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise _broken(
                folder, f"format_version is {version!r}, this release reads {FORMAT_VERSION}"
            )
        return Manifest.model_validate({**EARLIER, **document})
    except ValidationError as error:
        raise _broken(folder, f"{MANIFEST}: {first_fault(error)}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(folder, f"{MANIFEST} is not JSON ({error})") from None


def _read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    try:
        size = file.stat().st_size
        if size > MAX_WEIGHTS_BYTES:
            raise _broken(folder, f"{WEIGHTS} has {size} bytes, more than any soft prompt")
        digest = file_sha256(file)
    except OSError as error:
        raise _broken(folder, f"{WEIGHTS} can't be read ({error.strerror})") from None
    if digest != manifest.weights_sha256:
        raise _broken(
            folder, f"{WEIGHTS} does not match the digest in {MANIFEST}: cut short or altered"
        )
    try:
        tensors: dict[str, np.ndarray] = load_file(file)
    # A TypeError is raised for bfloat16, which numpy lacks.
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise _broken(folder, f"{WEIGHTS} is not a safetensors file of float32 ({error})") from None
    return tensors


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _broken(folder: Path, problem: str) -> BadInput:
    return BadInput(
        f"prompt artifact {folder}: {problem}",
        "register the prompt again from its search, or choose another version",
    )
