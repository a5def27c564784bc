"""Preparation: everything that is settled before a search uses resources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONTEXT, load, model_folder
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_jobs import job_document, small_job
from transformers import AutoModelForCausalLM, AutoTokenizer

import orchestrator.models.builtin
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.models.builtin import Recipe
from orchestrator.search.prepare import prepare
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.prompts.inits import InitContext, initial_prefix, initial_prompt

TINY = Recipe(
    documents=64, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16
)


def generating_job(folder: Path, **data: Any) -> JobSpec:
    """Return the small job with generated texts, an instruction and lists of references."""
    document = job_document(folder)
    for split, file in document["data"]["path"].items():
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        lists = [{**row, "right": [f" {split}", row["answer"]]} for row in rows]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in lists))
    space = document["search"]["space"] | {"init": ["random", {"text": "the quick brown fox"}]}
    document["search"] |= {"metric": "rouge_l", "space": space}
    document["data"] |= {"target": "answer", "verbalizer": None, "max_target_tokens": 40, **data}
    return JobSpec.model_validate(document)


def test_evaluated_splits_get_their_references(tmp_path: Path) -> None:
    """Validation and test rows have the column's references, also after an instruction or examples.

    Training rows have none.
    """
    task = prepare(generating_job(tmp_path, references="right")).task
    assert task.decoding == Decoding(max_tokens=40, num_beams=1)
    assert task.splits["train"].references == []
    assert len(task.instructed) == 2
    for split in ("validation", "test"):
        references = task.splits[split].references
        assert len(references) == len(task.splits[split]) and {
            texts[0] for texts in references
        } == {split}
        assert [splits[split].references for splits in task.instructed.values()] == [references] * 2


@pytest.mark.parametrize(("wanted", "limit"), [(2, 60), (64, 60), (0, 60), (4, 100)])
def test_examples_as_many_as_the_context_holds(tmp_path: Path, wanted: int, limit: int) -> None:
    """The few-shot baseline shows at most the examples asked for, within the context."""
    job = small_job(tmp_path, search__few_shot=wanted, data__max_input_tokens=limit)
    prepared = prepare(job)
    text, examples = prepared.few_shot
    assert (examples == wanted) if wanted < 4 else (0 < examples < 64)
    assert bool(text) == bool(examples) == (text in prepared.task.instructed)
    for splits in prepared.task.instructed.values():
        assert (
            max(max(split.lengths) for split in splits.values()) <= prepared.source.context_length
        )


def test_without_the_column_the_target_is_the_reference(tmp_path: Path) -> None:
    """Without a references column, each row's only reference is its target, stripped."""
    prepared = prepare(generating_job(tmp_path))
    wanted = [[row["answer"].strip()] for row in prepared.rows.test]
    assert prepared.task.splits["test"].references == wanted


def test_a_job_that_ranks_by_another_metric_generates_nothing(tmp_path: Path) -> None:
    """Nothing is generated when the search ranks by loss."""
    job = generating_job(tmp_path, references="right")
    job = job.model_copy(update={"search": job.search.model_copy(update={"metric": "loss"})})
    task = prepare(job).task
    assert task.decoding is None and task.splits["test"].references == []


def test_texts_that_may_outgrow_the_context_are_refused(tmp_path: Path) -> None:
    """Longest prompt, longest input and generated text must fit into the context together.

    This also holds when the targets are short.
    """
    job = generating_job(tmp_path)
    generation = job.generation.model_copy(update={"max_tokens": CONTEXT - 10})
    with pytest.raises(
        BadInput, match=f"a generated text of {CONTEXT - 10} exceed the context of {CONTEXT}"
    ):
        prepare(job.model_copy(update={"generation": generation}))


def test_making_the_quickstart_model_is_timed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds are counted where the model is made, not where it is cached or another is used."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(orchestrator.models.builtin, "Recipe", lambda: TINY)
    job = small_job(tmp_path, base_model__id="builtin:quickstart")
    making_s = prepare(job).making_s
    assert making_s > 0.01
    assert prepare(job).making_s < making_s / 2
    assert prepare(small_job(tmp_path)).making_s < making_s / 2


def peft_folder(folder: Path, config: PeftConfig) -> Path:
    """Save a new PEFT prompt for the small jobs' base model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def test_trials_start_from_a_peft_folder(tmp_path: Path) -> None:
    """``init: {artifact: FOLDER}`` takes a PEFT folder: the first prompt is what PEFT saved."""
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4)
    folder = peft_folder(tmp_path / "adapter", config)
    space = {"init": {"artifact": str(folder)}, "num_virtual_tokens": 3}
    prepared = prepare(small_job(tmp_path, search__space=space))
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(prepared.task.artifacts[str(folder)]["prompt"], saved)
    context = InitContext.of(load(model_folder()), [], prepared.task.artifacts)
    assert torch.equal(initial_prompt(prepared.trials[0], context), saved)


def test_a_peft_prefix_starts_prefixes_only(tmp_path: Path) -> None:
    """A PEFT prefix can't start a soft prompt; with prefix_tuning its keys and values are the
    start."""
    folder = peft_folder(
        tmp_path / "adapter", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    space = {"init": {"artifact": str(folder)}, "num_virtual_tokens": 3}
    with pytest.raises(BadInput, match="is a prefix and can't start method prompt_tuning"):
        prepare(small_job(tmp_path, search__space=space))
    prepared = prepare(small_job(tmp_path, search__space=space, method="prefix_tuning"))
    context = InitContext.of(load(model_folder()), [], prepared.task.artifacts)
    found = initial_prefix(prepared.trials[0], context)["decoder"]
    assert found.shape == (2, 2, 2, 3, 8)
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(found.permute(3, 0, 1, 2, 4).flatten(1), saved)


@pytest.mark.parametrize("generates", [False, True])
def test_an_init_text_too_long_to_be_an_instruction_is_left_out(
    tmp_path: Path, generates: bool
) -> None:
    """A text too long for the instruction baseline still starts prompts.

    The warning names the setting, the text and both lengths. A shorter text beside it is still
    compared.
    """
    job = generating_job(tmp_path) if generates else small_job(tmp_path)
    long = "the quick brown fox jumps over the lazy dog " * 30
    document = job.model_dump(exclude_unset=True)
    document["search"]["space"]["init"] = [
        "random",
        {"text": "the quick brown fox"},
        {"text": long},
    ]
    job = JobSpec.model_validate(document | {"search": {**document["search"], "trials": 16}})
    prepared = prepare(job)
    assert prepared.instructions == ["the quick brown fox"]
    assert long not in prepared.task.instructed
    (warning,) = [text for text in prepared.warnings if "search.space.init" in text]
    assert (
        "search.space.init text 'the quick brown fox" in warning
        and f"the context is {CONTEXT}" in warning
    )
    assert long in {spec.init_text for spec in prepared.trials}


def test_a_template_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    """The error comes before anything is started and has the template's number of tokens."""
    template = "is this message spam or ham? {text} is it?"
    with pytest.raises(
        BadInput, match=r"the template alone takes \d+ tokens, and max_input_tokens is 8"
    ):
        prepare(small_job(tmp_path, data__template=template, data__max_input_tokens=8))


def test_a_token_beyond_the_table_is_refused(tmp_path: Path) -> None:
    """A token that was added to the tokenizer without an embedding is BadInput.

    It is found in rows, in the verbalizer and in an init text.
    """
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    prepare(small_job(tmp_path, base_model__id=str(folder)))  # the job does not use the token
    wanted = (
        f"holds token '<added>', id {size}, and the base model's embedding table has {size} rows"
    )
    for change in (
        {"data__template": "{text} <added>"},
        {"data__verbalizer": {0: " ham", 1: " <added>"}},
        {"search__space": {"init": {"text": "a <added> text"}}},
    ):
        with pytest.raises(BadInput, match=wanted):
            prepare(small_job(tmp_path, base_model__id=str(folder), **change))


def test_weights_of_a_local_folder_are_looked_at(tmp_path: Path) -> None:
    """Weights that a worker could not use are refused before the search."""
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadInput, match=r"the weights are not finite: 1 of the 32 numbers of model.norm.weight"
    ):
        prepare(small_job(tmp_path, base_model__id=str(folder)))
