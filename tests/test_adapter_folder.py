"""A folder given in place of another kind: the message says what it is and what to name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import model_folder
from small_jobs import small_job

from orchestrator.artifact.peft import read_peft
from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.source import resolve_model
from orchestrator.search.prepare import prepare, stored_tensors


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused_as_model(folder: Path) -> BadInput:
    with pytest.raises(BadInput) as refused:
        resolve_model(BaseModelSpec(id=str(folder)), weights=False)
    assert refused.value.message.startswith(f"base_model.id {str(folder)!r} ")
    return refused.value


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_a_prompt_given_as_base_model_names_its_own(kind: str, tmp_path: Path) -> None:
    """The error names the prompt's base model and how to start from the prompt or register it."""
    folder = adapter(tmp_path / "a", peft_type=kind, base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    error = refused_as_model(folder)
    assert f"PEFT adapter ({kind}) of 'Qwen/Qwen2.5-0.5B'" in error.message
    assert (
        "set base_model.id to Qwen/Qwen2.5-0.5B" in error.hint
        and f"orchestrator import {folder}" in error.hint
    )


def test_another_adapter_may_be_merged(tmp_path: Path) -> None:
    error = refused_as_model(
        adapter(tmp_path / "a", peft_type="LORA", base_model_name_or_path="owner/base")
    )
    assert "(LORA) of 'owner/base'" in error.message and "merge_and_unload" in error.hint


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\xff", '{"base_model_name_or_path": null}', "[" * 100_000]
)
def test_an_adapter_that_says_nothing_is_still_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    error = refused_as_model(tmp_path)
    assert "is a PEFT adapter" in error.message and "the model that it was trained on" in error.hint


def test_a_folder_of_adapters_lists_them(tmp_path: Path) -> None:
    """A folder of adapters is refused with a list of them.

    Given as base model, the error also names the adapters' base model. Given as a prompt, both
    readers ask for one of the adapters.
    """
    for number in range(12):
        adapter(
            tmp_path / f"a{number:02}",
            peft_type="PROMPT_TUNING",
            base_model_name_or_path="owner/base",
        )
    (tmp_path / "a00" / "adapter_config.json").write_text("broken")
    error = refused_as_model(tmp_path)
    assert (
        "a00, a01" in error.message
        and "a09 and 2 more" in error.message
        and "owner/base" in error.hint
    )
    for read in (read_peft, stored_tensors):
        with pytest.raises(BadInput, match="holds prompts in its subfolders: a00, a01") as refused:
            read(tmp_path)
        assert "one of these" in refused.value.hint


def test_a_trial_that_starts_from_a_folder_of_adapters_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "prompts" / "best", peft_type="PROMPT_TUNING")
    job = small_job(tmp_path, search__space__init={"artifact": str(tmp_path / "prompts")})
    with pytest.raises(BadInput, match="holds prompts in its subfolders: best"):
        prepare(job, {str(tmp_path / "prompts"): tmp_path / "prompts"})


def test_a_folder_of_models_lists_them(tmp_path: Path) -> None:
    """A folder of models, such as training checkpoints, is refused with a list of them."""
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert "checkpoint-10, checkpoint-20" in refused_as_model(tmp_path).message


def test_a_model_given_as_a_prompt_is_refused() -> None:
    for read in (read_peft, stored_tensors):
        with pytest.raises(BadInput, match="is a model and not a prompt"):
            read(Path(model_folder()))
