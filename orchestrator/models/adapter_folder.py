"""Recognise a folder that was given in place of another kind of folder.

For example, a PEFT adapter may be given as a base model, or a folder of several models as one
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
ARTIFACT_MANIFEST = "manifest.json"
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
MAX_CONFIG_BYTES = 1 << 20
SHOWN = 10


@dataclass(frozen=True)
class Misplaced:
    """A description of the folder's actual content, and the user's next step."""

    what: str
    step: str


def instead_of_model(folder: Path) -> Misplaced | None:
    """Describe a folder given as a base model that is an adapter, or holds adapters or models.

    Return None for any other folder.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder)
    if models := subfolders_with(folder, MODEL_CONFIG):
        return Misplaced(
            f"holds models in its subfolders: {_listed(models)}", "name one of these folders"
        )
    if adapters := subfolders_with(folder, ADAPTER_CONFIG):
        bases = sorted({base for name in adapters if (base := _config(folder / name)[1])})
        step = "name the model that they were trained on"
        if bases:
            step = f"set base_model.id to {' or '.join(bases)}"
        return Misplaced(
            f"holds PEFT adapters in its subfolders and no model: {_listed(adapters)}", step
        )
    return None


def instead_of_adapter(folder: Path) -> Misplaced | None:
    """Describe a folder given as a prompt that holds several prompts, or is a model.

    Return None for any other folder.
    """
    for file in (ADAPTER_CONFIG, ARTIFACT_MANIFEST):
        if prompts := subfolders_with(folder, file):
            return Misplaced(
                f"holds prompts in its subfolders: {_listed(prompts)}", "name one of these folders"
            )
    if (folder / MODEL_CONFIG).is_file():
        return Misplaced(
            "is a model and not a prompt", "name the folder of a prompt that was trained on it"
        )
    return None


def subfolders_with(folder: Path, file: str) -> list[str]:
    """Return the names of direct subfolders that hold the file, or none if they can't be listed."""
    try:
        return sorted(path.parent.name for path in folder.glob(f"*/{file}") if path.is_file())
    except OSError:
        return []


def _adapter(folder: Path) -> Misplaced:
    kind, base = _config(folder)
    of_base = f" of {base!r}" if base else ""
    model = f"set base_model.id to {base or 'the model that it was trained on'}"
    if kind in PROMPTS:
        return Misplaced(
            f"is a PEFT adapter ({kind}){of_base} and not a model",
            f"{model}; trials start from the adapter with init: {{artifact: {folder}}}, "
            f"and orchestrator import {folder} --name NAME --job JOB registers it",
        )
    return Misplaced(
        f"is a PEFT adapter ({kind}){of_base} and not a model",
        f"{model}, or merge the adapter into the model: merge_and_unload() and "
        "save_pretrained(FOLDER) in Python",
    )


def _config(folder: Path) -> tuple[str, str]:
    """Read an adapter's PEFT type and base model, as far as its configuration names them."""
    try:
        with (folder / ADAPTER_CONFIG).open("rb") as stream:
            document = json.loads(stream.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, Mapping):
        return "unreadable", ""
    kind, base = document.get("peft_type"), document.get("base_model_name_or_path")
    return str(kind or "of unknown type")[:40], str(base or "")[:300]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
