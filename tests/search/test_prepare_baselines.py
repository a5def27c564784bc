"""Jobs of baselines up to their engine: early refusals, and evaluation of written prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import load, model_folder
from small_jobs import small_job

from orchestrator.errors import BadInput
from orchestrator.search.plan.measure import Bench
from orchestrator.search.prepare import Prepared, prepare
from orchestrator.search.workers.placement import Placement
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.reports import EvaluationJob

WORDED = "Is it long? {text} A:"


def designed(folder: Path, space: dict[str, Any], **changes: Any) -> Prepared:
    document = {
        "method": "prompt_design",
        "search__space": space,
        "train": {},
        "search__metric": "accuracy",
    }
    return prepare(small_job(folder, **document, **changes))


def test_written_prompts_are_evaluated_once_without_a_step(tmp_path: Path) -> None:
    """Each wording and number of demonstrations has its own loss.

    The bare wording's loss is the zero-shot loss.
    """
    space = {
        "template": ["{text}\nspam?", WORDED],
        "shots": [0, 1],
        "demonstrations": ["random", "nearest"],
    }
    made = designed(tmp_path, space, search__searcher="grid", search__trials=8)
    engine = make_engine(load(model_folder()), made.task, made.job.train, made.job.search, 4)
    before, losses = engine.backbone.digest(), {}
    for spec in made.trials:
        engine.seat("t", spec)
        (report,) = engine.round()
        assert (report.ending, report.step, report.costs.parameters) == (
            "evaluated",
            0,
            0,
        ) and not engine.slots
        losses[spec.template, spec.shots, spec.demonstrations] = report.metrics["loss"]
        again = engine.evaluate(EvaluationJob("validation", report.checkpoint, spec=spec))
        assert again["loss"] == pytest.approx(report.metrics["loss"])
    bare = engine.evaluate(EvaluationJob("validation"))["loss"]
    assert (
        losses["{text}\nspam?", 0, "random"]
        == losses["{text}\nspam?", 0, "nearest"]
        == pytest.approx(bare)
    )
    assert len({round(loss, 6) for loss in losses.values()}) == 6
    assert engine.backbone.digest() == before


def test_demonstrations_that_did_not_fit_are_told(tmp_path: Path) -> None:
    """The report says how many demonstrations fitted into the context."""
    made = designed(tmp_path, {"shots": 40})
    engine = make_engine(load(model_folder()), made.task, made.job.train, made.job.search, 1)
    engine.seat("t", made.trials[0])
    (report,) = engine.round()
    assert "the context has room for" in report.note and report.note.endswith(
        "of 40 demonstrations"
    )


def test_a_wording_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A wording is refused when it exceeds the context or names an unknown column.

    It is also refused when not a single demonstration fits.
    """
    wordings = {"template": ["{text}", "{text} " + "long " * 100]}
    with pytest.raises(BadInput, match="exceed the context"):
        designed(tmp_path, wordings, data__max_input_tokens=900)
    with pytest.raises(
        BadInput, match="the template alone takes 401 tokens, and max_input_tokens is 400"
    ):
        designed(tmp_path, wordings, data__max_input_tokens=400)
    with pytest.raises(BadInput, match="names column 'title'"):
        designed(tmp_path, {"template": "{title} {text}"})
    long = "a quick question about the lazy dog " * 9 + "{text}"
    with pytest.raises(BadInput, match="no room for a single demonstration"):
        designed(tmp_path, {"template": long, "shots": 2}, data__max_input_tokens=150)


def test_a_missing_library_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tuning.baselines.lora.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="method lora needs the package peft"):
        prepare(
            small_job(
                tmp_path,
                method="lora",
                search__space={"learning_rate": 0.1},
                data__path={"train": "none"},
            )
        )


@pytest.mark.parametrize("method", ["lora", "prompt_design"])
def test_a_plan_measures_a_baseline(tmp_path: Path, method: str) -> None:
    """The largest trial's steps and the evaluations are timed; the model is left unchanged."""
    space = {"learning_rate": 0.1, "rank": [2, 8]} if method == "lora" else {"shots": [0, 1]}
    changes: dict[str, Any] = {} if method == "lora" else {"train": {}}
    made = prepare(
        small_job(
            tmp_path, method=method, search__space=space, search__metric="accuracy", **changes
        )
    )
    backbone = load(model_folder())
    before = backbone.digest()
    bench = Bench(made, Placement(1, 1, 0, 1, 1), backbone)
    assert bench.largest() == () and bench.bare_row() > 0
    pace = bench.pace()
    assert pace.evaluation_alone > 0 and (pace.step_alone > 1e-4) == (method == "lora")
    assert backbone.digest() == before
