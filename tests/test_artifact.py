"""The prompt artifact is written whole or not at all, and only read if it is fully valid."""

from __future__ import annotations

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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from orchestrator.artifact import (
    MANIFEST,
    WEIGHTS,
    BaseModelRecord,
    DataRecord,
    Manifest,
    PromptArtifact,
    VerbalizerEntry,
    file_sha256,
    read_manifest,
)
from orchestrator.artifact import prompt as artifact
from orchestrator.errors import BadInput

SHAPE = (3, 8)
HALF = torch.ones(SHAPE).bfloat16()
PROMPT = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def manifest(**changes: Any) -> Manifest:
    base = BaseModelRecord(
        id="tiny", revision="main", model_type="llama", hidden_size=8, vocab_size=330,
        context_length=160,
        fingerprint="f" * 64, tokenizer_digest="t" * 64,
    )  # fmt: skip
    made = Manifest(
        method="prompt_tuning", num_virtual_tokens=3,
        config={"init": {"text": "é"}, "learning_rate": 0.3, "seed": 1},
        template="{text}\nspam?", target="label",
        verbalizer=(VerbalizerEntry(label=True, text=" yes"), VerbalizerEntry(label=1, text=" one"),
                    VerbalizerEntry(label="1", text=" “1”")),
        max_input_tokens=64, max_target_tokens=8, base_model=base,
        data=DataRecord(path="x", fingerprint="d", rows={"train": 3}),
        metrics={"test": {"accuracy": 0.1 + 0.2}},
        baselines={"zero_shot": {"test": {"accuracy": 0.5}}}, steps=4,
        search="s", trial="t000", orchestrator_version="0",
    )  # fmt: skip
    return made.model_copy(update=changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return PromptArtifact(PROMPT, manifest()).save(tmp_path / "prompt")


def test_round_trip(saved: Path) -> None:
    """Weights are restored bit by bit; every manifest field keeps its value and type."""
    found = PromptArtifact.load(saved)
    assert found.weights.dtype == np.float32 and np.array_equal(found.weights, PROMPT)
    assert found.manifest == manifest(
        weights_sha256=file_sha256(saved / WEIGHTS), created_at=found.manifest.created_at
    )
    labels = found.manifest.verbalizer_map()
    assert [(type(entry.label), entry.label) for entry in found.manifest.verbalizer or ()] == [
        (bool, True), (int, 1), (str, "1"),
    ]  # fmt: skip
    assert labels is not None and labels["1"] == " “1”"
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, WEIGHTS]
    assert read_manifest(saved) == found.manifest


def test_a_generation_task_has_no_verbalizer(tmp_path: Path) -> None:
    """A missing verbalizer is still None after loading."""
    folder = PromptArtifact(PROMPT, manifest(verbalizer=None)).save(tmp_path / "prompt")
    assert PromptArtifact.load(folder).manifest.verbalizer_map() is None


@given(st.text(), st.text())
def test_any_text_survives_the_manifest(template: str, target: str) -> None:
    """Templates and names in any script survive the way through JSON."""
    made = manifest(template=template, target=target)
    assert Manifest.model_validate(json.loads(made.model_dump_json())) == made


def test_weights_are_saved_as_float32(tmp_path: Path) -> None:
    """Weights of any float type and memory layout are saved as float32."""
    wide = PROMPT.astype(np.float64).T.copy().T
    assert not wide.flags["C_CONTIGUOUS"]
    found = PromptArtifact.load(PromptArtifact(wide, manifest()).save(tmp_path / "prompt"))
    assert np.array_equal(found.weights, PROMPT)


def replaced_weights(folder: Path, save: Callable[[Path], None]) -> None:
    """Replace the weights and give the manifest the matching digest."""
    save(folder / WEIGHTS)
    document = json.loads((folder / MANIFEST).read_text())
    document["weights_sha256"] = file_sha256(folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(document))


def weights(tensors: dict[str, np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: replaced_weights(folder, lambda file: save_file(tensors, file))


def edited(**changes: Any) -> Callable[[Path], None]:
    """Set keys of the manifest; a value of ``...`` removes the key."""

    def edit(folder: Path) -> None:
        document = json.loads((folder / MANIFEST).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not ...}
        (folder / MANIFEST).write_text(json.dumps(kept))

    return edit


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, length)


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def weights_as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def raw_manifest(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_bytes(data) and None


def not_finite(value: float) -> dict[str, np.ndarray]:
    broken = PROMPT.copy()
    broken[1, 2] = value
    return {"prompt": broken}


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (cut(WEIGHTS, 100), "cut short or altered"),
    "empty weights": (cut(WEIGHTS, 0), "cut short or altered"),
    "one bit of the weights": (flip, "does not match the digest"),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(),
        r"prompt\.safetensors can't be read \(No such file"),
    "weights a folder": (weights_as_folder, r"can't be read \(Is a directory"),
    "nan": (weights(not_finite(np.nan)), "not finite"),
    "infinity": (weights(not_finite(-np.inf)), "not finite"),
    "fewer tokens": (weights({"prompt": PROMPT[:2]}),
        r"shape \[2, 8\], the manifest says \[3, 8\]"),
    "another width": (weights({"prompt": PROMPT[:, :4].copy()}),
        r"shape \[3, 4\], the manifest says \[3, 8\]"),
    "three dimensions": (weights({"prompt": PROMPT[None]}),
        r"shape \[1, 3, 8\], the manifest says \[3, 8\]"),
    "float64": (weights({"prompt": PROMPT.astype(np.float64)}), "is float64, expected float32"),
    "float16": (weights({"prompt": PROMPT.astype(np.float16)}), "is float16, expected float32"),
    "integers": (weights({"prompt": np.ones(SHAPE, np.int32)}), "is int32, expected float32"),
    "bfloat16": (
        lambda folder: replaced_weights(folder, lambda file: save_torch({"prompt": HALF}, file)),
        "not a safetensors file of float32",
    ),
    "another tensor name": (weights({"soft": PROMPT}),
        r"holds \['soft'\], prompt_tuning has prompt"),
    "a second tensor": (weights({"prompt": PROMPT, "more": PROMPT}), r"holds \['more', 'prompt'\]"),
    "no tensor": (weights({}), r"holds \[\]"),
    "a pickle": (
        lambda folder: replaced_weights(folder,
            lambda file: torch.save({"prompt": torch.ones(SHAPE)}, file)),
        "not a safetensors file",
    ),
    "manifest gone": (lambda folder: (folder / MANIFEST).unlink(),
        r"manifest\.json can't be read \(No such file"),
    "manifest cut": (cut(MANIFEST, 300), r"manifest\.json is not JSON"),
    "manifest empty": (cut(MANIFEST, 0), r"manifest\.json is not JSON"),
    "manifest not text": (raw_manifest(b"\xff\xfe{}"), "is not UTF-8"),
    "manifest a list": (raw_manifest(b"[]"), "format_version is None, this release reads 1"),
    "manifest nested too deep": (raw_manifest(b"[" * 100_000), r"manifest\.json is not JSON"),
    "manifest with an endless number": (raw_manifest(b"1" * 10_000), r"manifest\.json is not JSON"),
    "a later format": (edited(format_version=2), "format_version is 2, this release reads 1"),
    "no format": (edited(format_version=...), "format_version is None"),
    "format as text": (edited(format_version="1"), "format_version is '1'"),
    "a key too many": (edited(code="import os"),
        r"manifest\.json: code: Extra inputs are not permitted"),
    "a key too few": (edited(template=...), r"manifest\.json: template: Field required"),
    "no virtual tokens": (edited(num_virtual_tokens=0), "num_virtual_tokens"),
    "a deeper key too many": (edited(data={"path": "x", "fingerprint": "", "rows": {}, "url": "x"}),
        r"data\.url"),
    "no digest": (edited(weights_sha256=...), "does not match the digest"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_refused(saved: Path, damage: str) -> None:
    """Loading a damaged artifact raises an error that names the fault, the file and the fix.

    No other exception escapes.
    """
    harm, message = DAMAGES[damage]
    harm(saved)
    with pytest.raises(BadInput, match=message) as refused:
        PromptArtifact.load(saved)
    assert str(saved) in refused.value.message and "choose another version" in refused.value.hint


def test_any_cut_of_the_weights_is_refused(saved: Path) -> None:
    """Weights cut at any length are refused, also when the header is still whole."""
    data = (saved / WEIGHTS).read_bytes()
    for length in range(0, len(data), 7):
        (saved / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(BadInput):
            PromptArtifact.load(saved)


def test_huge_files_are_refused_unread(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files larger than any prompt are refused without reading them."""
    monkeypatch.setattr(artifact, "MAX_WEIGHTS_BYTES", 10)
    monkeypatch.setattr(artifact, "load_file", lambda file: pytest.fail("was read"))
    with pytest.raises(BadInput, match="more than any soft prompt"):
        PromptArtifact.load(saved)


@pytest.mark.parametrize("failing", ["save_file", "file_sha256", "os.rename"])
def test_nothing_is_left_when_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A failed save leaves no folder, not even a temporary one.

    The causes are a full disk, a lost digest and a failed move.
    """

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    owner, name = (artifact.os, "rename") if "." in failing else (artifact, failing)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        PromptArtifact(PROMPT, manifest()).save(tmp_path / "prompts" / "mine")
    assert list((tmp_path / "prompts").iterdir()) == []


def test_an_artifact_is_never_overwritten(saved: Path) -> None:
    """Saving to an existing path fails and leaves the existing files unchanged."""
    with pytest.raises(OSError, match="not empty"):
        PromptArtifact(PROMPT + 1, manifest()).save(saved)
    assert np.array_equal(PromptArtifact.load(saved).weights, PROMPT)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_folder_can_be_read_by_others(saved: Path) -> None:
    """The saved folder is readable by other users.

    The registry's server may run as another user, so the restrictive permissions of the temporary
    folder must not remain.
    """
    assert saved.stat().st_mode & 0o777 == 0o755


def test_artifacts_are_read_without_torch() -> None:
    """Reading artifacts does not import torch, which keeps registry and command line light."""
    code = "import sys, orchestrator.artifact; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
