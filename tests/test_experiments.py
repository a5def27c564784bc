"""The script of docs/experiments.md: runs all trials to their end and judges them as a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import small_job, write_job

from orchestrator.job.space import trials
from orchestrator.search.prepare import prepare
from orchestrator.tuning.engine import Engine
from orchestrator.tuning.reports import EvaluationJob
from tests.benchmarks.experiments import (
    Experiment,
    OtherRows,
    Trial,
    lines,
    main,
    run_experiment,
    table,
)

SPACE = {
    "search__space__init": ["random", "class_labels"],
    "search__space__num_virtual_tokens": 3,
    "search__space__learning_rate": [0.01, 0.3],
    "search__space__seed": [0, 1],
    "search__searcher": "grid",
    "search__trials": 8,
    "train__steps": 6,
    "train__evaluate_every": 3,
}

BASELINE = {
    "method": "model_tuning",
    "search__space": {"learning_rate": [0.001], "seed": [0, 1]},
    "search__searcher": "grid",
    "search__trials": 2,
    "train__steps": 2,
    "train__evaluate_every": 1,
}

WRITTEN = {
    "method": "prompt_design",
    "search__space": {"shots": [0, 2], "seed": 0},
    "search__searcher": "grid",
    "search__trials": 2,
    "train": {},
}


def test_every_trial_runs_to_its_end_as_it_would_alone(tmp_path: Path) -> None:
    """Eight trials, four at a time, all end; one of them run alone has the same result."""
    job = small_job(tmp_path, **SPACE)
    found = run_experiment(job, capacity=4)
    assert [trial.config for trial in found.trials] == [
        spec.config() for spec in trials(job.search)
    ]
    assert {trial.steps for trial in found.trials} == {6} and found.parameters > 0
    assert set(found.untuned) == {"no prompt", "4 examples"}
    prepared = prepare(job)
    from orchestrator.models.backbone import load_backbone
    from orchestrator.models.source import resolve_model

    engine = Engine(
        load_backbone(resolve_model(job.base_model)), prepared.task, job.train, job.search, 1
    )
    engine.seat("alone", prepared.trials[3])
    reports = [engine.round() for _ in range(2)][-1]
    alone = engine.evaluate(EvaluationJob("test", reports[0].checkpoint))
    assert found.trials[3].metrics["test"] == pytest.approx(alone, rel=1e-3)


def test_lines_take_the_best_rate_of_each_seed_by_validation(tmp_path: Path) -> None:
    """Validation chooses one trial per seed; test values and their spread are of these trials."""

    def trial(seed: int, rate: float, validation: float, test: float) -> Trial:
        config = {"init": "random", "num_virtual_tokens": 3, "learning_rate": rate, "seed": seed}
        return Trial(config, 6, {"validation": {"loss": validation}, "test": {"loss": test}})

    given = [
        trial(0, 0.01, 2.0, 9.0),
        trial(0, 0.3, 1.0, 5.0),
        trial(1, 0.01, 3.0, 7.0),
        trial(1, 0.3, 4.0, 1.0),
    ]
    experiment = Experiment(
        small_job(tmp_path, **SPACE), given, {"no prompt": given[0].metrics}, 1000, 1.0
    )
    (line,) = lines(experiment, ["init"])
    assert (line.values, line.rates, line.mean) == ([5.0, 7.0], [0.3, 0.01], 6.0)
    assert line.spread == pytest.approx(2**0.5)
    assert "| random | 6.000 ± 1.414 | 5.000, 7.000 | 0.3, 0.01 |" in list(
        table(experiment, ["init"])
    )


def test_a_vote_of_one_is_its_own_answer(tmp_path: Path) -> None:
    """The majority vote of a single prompt is that prompt's answer."""
    job = small_job(
        tmp_path, **{**SPACE, "search__space__init": "random", "search__space__learning_rate": 0.3}
    )
    found = run_experiment(
        job.model_copy(update={"search": job.search.model_copy(update={"trials": 1})}), vote=True
    )
    assert found.voted == found.trials[0].metrics["test"]["accuracy"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table on the screen, and all trials as JSON."""
    job = write_job(tmp_path, **{**SPACE, "train__steps": 3})
    out = tmp_path / "build" / "x.json"
    assert main([str(job), "--set", "search.space.seed=0", "--by", "init", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| class_labels |" in shown and "| no prompt |" in shown
    document = json.loads(out.read_text())
    assert len(document["trials"]) == 4 and document["metric"] == "loss"


@pytest.mark.parametrize("method", ["prompt_tuning", "model_tuning", "prompt_design"])
def test_other_files_are_evaluated_too(tmp_path: Path, method: str) -> None:
    """The same rows under another file name give the same figures, for every method."""
    jobs = {"prompt_tuning": SPACE, "model_tuning": BASELINE, "prompt_design": WRITTEN}
    job = small_job(tmp_path, **jobs[method])
    path = job.data.path
    assert job.method == method and not isinstance(path, str)
    found = run_experiment(job, also={"again": OtherRows(str(path.test))})
    assert found.trials and all(
        trial.metrics["again"] == trial.metrics["test"] for trial in found.trials
    )
    assert any(line.startswith("| all, again |") for line in table(found, []))


def test_rows_of_another_file_can_be_chosen_by_a_value(tmp_path: Path) -> None:
    """The rows of either label are evaluated alone, and together they are the file's rows."""
    job = small_job(tmp_path, **BASELINE)
    path = job.data.path
    assert not isinstance(path, str) and path.test is not None
    labels = [json.loads(line)["label"] for line in Path(path.test).read_text().splitlines()]
    assert 0 < sum(labels) < len(labels)
    also = {str(label): OtherRows(path.test, {"label": label}) for label in (0, 1)}
    found = run_experiment(job, also=also, untuned=False)
    assert found.untuned == {}
    for trial in found.trials:
        right = sum(trial.metrics[str(label)]["accuracy"] * labels.count(label) for label in (0, 1))
        assert right == pytest.approx(trial.metrics["test"]["accuracy"] * len(labels))
