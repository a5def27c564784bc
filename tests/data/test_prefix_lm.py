"""LM adaptation: texts cut in two, long continuations cut off, and use of the tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import load, model_folder
from small_jobs import small_job

from orchestrator.data.dataset import cut_in_two, load_rows
from orchestrator.errors import BadInput, SpecError
from orchestrator.models.source import resolve_model
from orchestrator.search.prepare import prepare
from orchestrator.tuning.baselines.store import save_result
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.reports import EvaluationJob

TEXT = "the quick brown fox jumps over the lazy dog"


def adaptation(folder: Path, **changes: Any) -> Any:
    """Return a model tuning job on the small job's texts."""
    data = {
        "prefix_lm": "text",
        "template": "{prefix}",
        "target": "continuation",
        "max_target_tokens": 6,
    }
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    search = {"space": {"learning_rate": 0.01}, "metric": "loss", "few_shot": 0}
    train = {"steps": 20, "batch_size": 8, "evaluate_every": 20}
    return small_job(
        folder,
        method="model_tuning",
        data={"path": files, **data, **changes},
        search=search,
        train=train,
    )


def test_a_text_is_a_prefix_and_what_follows() -> None:
    """Prefix and continuation together are the text, and the seed decides the cut.

    A text of one word can't be cut and is left out.
    """
    rows = [{"text": TEXT}] * 20 + [{"text": "alone"}]
    cut = list(cut_in_two(rows, "text", 0))
    assert len(cut) == 20 and {row["prefix"] + row["continuation"] for row in cut} == {TEXT}
    assert len({row["prefix"] for row in cut}) > 4 and all(row["prefix"] for row in cut)
    assert all(row["continuation"].startswith(" ") for row in cut)
    assert cut == list(cut_in_two(rows, "text", 0)) != list(cut_in_two(rows, "text", 1))
    with pytest.raises(BadInput, match="row 1 of the data has no text there"):
        list(cut_in_two(rows, "body", 0))


def test_an_adapted_model_is_a_base_model_that_knows_the_texts(tmp_path: Path) -> None:
    """Model tuning on the pieces lowers their loss.

    The saved folder, loaded as a base model, has the tuned loss.
    """
    job = adaptation(tmp_path)
    made = prepare(job)
    assert max(len(ids) for ids in made.task.splits["train"].targets) == 6
    engine = make_engine(load(model_folder()), made.task, job.train, job.search, 1)
    bare = engine.evaluate(EvaluationJob("validation"))["loss"]
    engine.seat("t", made.trials[0])
    (report,) = engine.round()
    assert report.metrics["loss"] < 0.8 * bare
    tensors = Checkpoint.from_bytes(report.checkpoint).best()
    folder = save_result(
        tmp_path / "adapted",
        made.trials[0],
        tensors,
        resolve_model(job.base_model),
        {"method": "model_tuning"},
    )
    adapted = make_engine(load(folder), made.task, job.train, job.search, 1)
    assert adapted.evaluate(EvaluationJob("validation"))["loss"] == pytest.approx(
        report.metrics["loss"], rel=1e-4
    )


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    """The template and the target have to name the prefix and the continuation."""
    with pytest.raises(SpecError, match="set continuation"):
        adaptation(tmp_path, target="label")
    with pytest.raises(SpecError, match="the template lacks"):
        adaptation(tmp_path, template="{text}")


def test_rows_keep_the_pieces_alone(tmp_path: Path) -> None:
    job = adaptation(tmp_path)
    first = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    (row, *_) = load_rows(job.data).test
    assert set(row) == {"prefix", "continuation"} and first["text"].startswith(row["prefix"])
