"""Jobs on conversations and in chat templates: what is said about them before any work is spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_models import chat_folder
from models import CONTEXT, model_folder
from small_jobs import Command, write_job

from orchestrator.errors import BadInput
from orchestrator.job.yaml import load_job
from orchestrator.search.prepare import Prepared, chat_record, prepare

ANSWER = {"role": "assistant", "content": "good"}


def talk(text: str, *more: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, *more, ANSWER]


def conversation_job(folder: Path, model: Path, talks: Sequence[Any] = (), **data: Any) -> Path:
    """Write a job on conversations; ``talks`` stand in front of the training rows."""
    path = {}
    for split in ("train", "validation", "test"):
        good = [
            [
                {"role": "user", "content": f"{split} {number}"},
                {**ANSWER, "content": f"no {number}"},
            ]
            for number in range(12)
        ]
        rows = [*(talks if split == "train" else ()), *good]
        file = folder / f"{split}.jsonl"
        lines = (json.dumps({"turns": row, "n": place}) for place, row in enumerate(rows))
        file.write_text("\n".join(lines), encoding="utf-8")
        path[split] = str(file)
    job = {
        "name": "talk",
        "base_model": {"id": str(model)},
        "data": {"path": path, "messages": "turns", "max_input_tokens": 100, **data},
        "search": {"metric": "loss", "space": {"num_virtual_tokens": 4}},
        "train": {"steps": 4, "evaluate_every": 2},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return file


def prepared(job: Path) -> Prepared:
    return prepare(load_job(job))


def test_leaving_the_chat_template_out_is_explained(command: Command, tmp_path: Path) -> None:
    """``validate`` and ``prepare`` say what it means, unless the job says ``chat: false``."""
    job = write_job(tmp_path, base_model__id=str(chat_folder("chatml")))
    said = command("validate", job)
    assert said.code == 0 and "has a chat template, and data.chat is not set" in said.out
    assert any("data.chat is not set" in text for text in prepared(job).warnings)
    for chat in (False, True):
        job = write_job(tmp_path, base_model__id=str(chat_folder("chatml")), data__chat=chat)
        assert "data.chat" not in command("validate", job).out
        assert not any("data.chat" in text for text in prepared(job).warnings)
    assert "chat template" not in command("validate", write_job(tmp_path)).out


@pytest.mark.parametrize("key", ["data.chat", "data.messages"])
def test_a_model_without_a_chat_template_is_a_problem_of_the_job(
    command: Command, tmp_path: Path, key: str
) -> None:
    """``validate`` and ``prepare`` name the key and the next step."""
    if key == "data.chat":
        job = write_job(tmp_path, data__chat=True)
    else:
        job = conversation_job(tmp_path, model_folder())
    said = command("validate", job)
    assert said.code == 2 and f"{key}: base_model.id" in said.err
    assert "has no chat template" in said.err and "-Instruct" in said.err
    with pytest.raises(BadInput, match=f"{key}: the base model has no chat template"):
        prepared(job)


def test_a_bad_conversation_is_found_by_validate(command: Command, tmp_path: Path) -> None:
    """``validate`` names the row and the column with the line of the key in the job."""
    bad = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    job = conversation_job(tmp_path, chat_folder("chatml"), [talk("a"), bad])
    said = command("validate", job, "--json")
    (problem,) = said.document["error"]["problems"]
    assert (said.code, problem["where"]) == (2, "data.messages")
    assert problem["line"] == 1 + job.read_text().splitlines().index("  messages: turns")
    assert "train.jsonl:2 (row 2), column 'turns': turn 2 has the role 'tool'" in problem["message"]


def test_a_missing_prompt_column_says_that_the_template_is_missing(
    command: Command, tmp_path: Path
) -> None:
    """A job without template, target and messages needs rows of prompt and completion."""
    job = write_job(tmp_path)
    document = yaml.safe_load(job.read_text())
    for key in ("template", "target", "verbalizer"):
        del document["data"][key]
    document["search"]["space"]["init"] = "random"
    job.write_text(yaml.safe_dump(document))
    said = command("validate", job)
    assert said.code == 2
    assert "data.template is missing: rows without one need column 'prompt'" in said.err


def test_a_conversation_is_prepared_with_its_format(tmp_path: Path) -> None:
    """The record of the artifact has the column and the template's digest."""
    made = prepared(conversation_job(tmp_path, chat_folder("chatml")))
    record = chat_record(made.task.encoder)
    assert record is not None and record.messages == "turns" and len(record.template_sha256) == 64
    assert made.task.encoder.end_id == made.task.splits["test"].targets[0][-1]


@pytest.mark.parametrize(
    ("model", "bad", "fault"),
    [
        ("gemma", [{"role": "system", "content": "brief"}, *talk("a")], "System role not support"),
        ("qwen", talk("a", {**ANSWER, "content": "<think>b</think>c"}, *talk("d")[:1]),
            "changes turn 2 (assistant)"),
        ("chatml", talk("fox " * 80), "the conversation takes"),
        ("mistral", talk("a", *talk("b")[:1]), "have to alternate"),
    ],
)  # fmt: skip
def test_what_the_chat_template_refuses_is_named_with_row_and_column(
    tmp_path: Path, model: str, bad: Any, fault: str
) -> None:
    """Faults that only show in the rendered conversation are found before the search begins."""
    job = conversation_job(tmp_path, chat_folder(model), [talk("ok"), bad])
    with pytest.raises(BadInput) as refused:
        prepared(job)
    said = refused.value.message
    assert "train.jsonl:2 (row 2): column 'turns'" in said and fault in said


def test_a_row_longer_than_the_context_is_named(tmp_path: Path) -> None:
    """A rendered conversation that fits the limit but not the context is named too."""
    job = conversation_job(
        tmp_path, chat_folder("chatml"), [talk("ok"), talk("fox " * 60)], max_input_tokens=1000
    )
    with pytest.raises(BadInput, match=f"exceed the context of {CONTEXT}") as refused:
        prepared(job)
    assert "train.jsonl:2 (row 2): column 'turns'" in refused.value.message


def test_stripped_white_space_is_a_warning_with_a_row(tmp_path: Path) -> None:
    """White space that the template strips is said with the number of rows and the first one."""
    job = conversation_job(tmp_path, chat_folder("llama3"), [talk("ok"), talk(" fox\n")])
    (warning,) = [text for text in prepared(job).warnings if "strips white space" in text]
    assert "of 1 row, for" in warning and "train.jsonl:2 (row 2)" in warning
