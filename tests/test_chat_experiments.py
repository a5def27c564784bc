"""The experiments on a chat model: their jobs, saved results and tables. Nothing large is trained.

The results of most tests are made up; the last tests train a tiny random model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_jobs import write_job

from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job
from tests.benchmarks import chat_model
from tests.benchmarks.__main__ import main
from tests.benchmarks.chat_model import (
    EXPERIMENTS,
    JOBS,
    SETTINGS,
    ChatExperiment,
    Outcome,
    Row,
    Series,
    Setting,
    finished,
    lines,
    markdown,
    one_trial,
    result_file,
    run,
)
from tests.benchmarks.experiments import OtherRows

REAL = SETTINGS["real"]


def job_of(series: Series, *changes: str) -> JobSpec:
    return load_job(JOBS / f"{series.file}.yaml", [*series.changes, *changes])


def series_of(experiment: str, label: str) -> Series:
    (found,) = [each for each in EXPERIMENTS[experiment].series if each.label == label]
    return found


def outcome(job: JobSpec, value: float, test: float | None = None, **splits: float) -> Outcome:
    """Make up an outcome whose metrics are all ``value``, or as given by split."""
    metric, space = job.search.metric, job.search.space
    values = {"validation": value, "test": value if test is None else test, **splits}
    config = {"seed": space.seed, "learning_rate": space.learning_rate}
    return Outcome(config, {split: {metric: each} for split, each in values.items()}, 10.0, 1000)


def save(job: JobSpec, value: float, also: dict[str, OtherRows]) -> None:
    """Save a made-up result of a job of one trial."""
    made = outcome(job, value, **dict.fromkeys(also, value))
    document = {
        "trials": [{"config": made.config, "metrics": made.metrics}],
        "seconds": made.seconds,
        "parameters": made.parameters,
    }
    file = result_file(job, also)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))


def chosen(series: Series, values: dict[tuple[int, float], float | None]) -> list[Any]:
    """Return the seeds and rates of the series' outcomes, given validation values."""

    def find(job: JobSpec) -> Outcome | None:
        space = job.search.space
        assert isinstance(space.seed, int) and isinstance(space.learning_rate, float)
        value = values.get((space.seed, space.learning_rate))
        return None if value is None else outcome(job, value)

    (row,) = chat_model.rows_of(ChatExperiment("", "", (series,)), REAL, (), "", find)
    return [(each.config["seed"], each.config["learning_rate"]) for each in row.outcomes]


@pytest.mark.parametrize("size", SETTINGS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_jobs_of_an_experiment_are_valid(name: str, size: str) -> None:
    """Each series is a valid job of a chat, ranked by the same metric, under its own label."""
    experiment, setting = EXPERIMENTS[name], SETTINGS[size]
    assert len({series.label for series in experiment.series}) == len(experiment.series)
    jobs = [row.job for row in chat_model.rows_of(experiment, setting, (), "", lambda job: None)]
    assert len({job.search.metric for job in jobs}) == 1 and all(job.data.uses_chat for job in jobs)
    for job in jobs:
        assert job.data.limit.train == 32 or size == "real" or name == "low-data"


@pytest.mark.parametrize("name", ["trec6", "sms-spam", "sst2"])
def test_all_methods_are_compared(name: str) -> None:
    """Every method has a series, except qlora (rounded LoRA) and lomo (model tuning with SGD)."""
    from orchestrator.job.spec import SPACES

    methods = {job_of(series).method for series in EXPERIMENTS[name].series}
    assert methods == set(SPACES) - {"qlora", "lomo"}


@pytest.mark.parametrize(
    ("name", "label"),
    [("init", "class_labels"), ("length", "10"), ("low-data", "1000 rows, class_labels")],
)
def test_experiments_share_the_trials_of_equal_jobs(name: str, label: str) -> None:
    """Prompt tuning on trec6 is a line of three other experiments, and trained once."""
    ours = one_trial(job_of(series_of(name, label)), 1, 0.05)
    theirs = one_trial(job_of(series_of("trec6", "prompt tuning")), 1, 0.05)
    assert result_file(ours, {}) == result_file(theirs, {})


def test_a_result_belongs_to_its_job_alone() -> None:
    """Another seed, rate, limit, number format or further rows mean another result."""
    series = series_of("trec6", "prompt tuning")
    job = one_trial(job_of(series), 0, 0.05)
    others = [
        one_trial(job_of(series), 1, 0.05),
        one_trial(job_of(series), 0, 0.01),
        one_trial(job_of(series, "data.limit.train=16"), 0, 0.05),
        one_trial(job_of(series, "base_model.dtype=bfloat16"), 0, 0.05),
    ]
    rows = {"amazon": OtherRows("test.jsonl", {"source": "amazon"})}
    files = {result_file(job, {}), result_file(job, rows), *(result_file(it, {}) for it in others)}
    assert len(files) == 6


def test_the_first_seed_chooses_the_learning_rate() -> None:
    """The best rate of seed 0 by validation is used with the others, whatever they would prefer."""
    series = series_of("trec6", "prompt tuning")
    values = {(0, 0.01): 0.4, (0, 0.05): 0.6, (1, 0.05): 0.1, (1, 0.01): 0.9, (2, 0.05): 0.2}
    assert chosen(series, {**values}) == [(0, 0.05), (1, 0.05), (2, 0.05)]
    losses = Series("loss", series.file, (*series.changes, "search.metric=loss"))
    assert chosen(losses, {**values, (2, 0.01): 1.0}) == [(0, 0.01), (1, 0.01), (2, 0.01)]


def test_no_learning_rate_is_chosen_before_all_were_tried() -> None:
    """A series whose first seed lacks a rate has no outcomes, so no table prefers another."""
    series = series_of("trec6", "prompt tuning")
    assert chosen(series, {(0, 0.05): 0.6, (1, 0.05): 0.6}) == []
    assert chosen(series, {(0, 0.05): 0.6, (0, 0.01): 0.5, (2, 0.05): 0.6}) == [
        (0, 0.05),
        (2, 0.05),
    ]


def test_a_broken_trial_is_never_the_best() -> None:
    """A rate at which the first seed broke is not chosen; a seed that breaks is counted missing."""
    series = series_of("trec6", "prompt tuning")

    def find(job: JobSpec) -> Outcome:
        space = job.search.space
        broke = space.learning_rate == 0.05 or space.seed == 1
        return Outcome({}, {}, 1.0, 1) if broke else outcome(job, 0.3)

    (row,) = chat_model.rows_of(ChatExperiment("", "", (series,)), REAL, (), "", find)
    assert [each.config["seed"] for each in row.outcomes] == [0, 2]
    (line,) = lines([row], [])
    assert line.shown["by seed"] == "0.300, 0.300 (2 of 3)"


def test_the_table() -> None:
    """A row has mean, spread, each seed and the gain elsewhere; one without results says so."""
    series = series_of("sst2", "prompt tuning")
    job = job_of(series)
    made = [
        outcome(one_trial(job, seed, 0.05), 0.5, test, amazon=test - 0.25)
        for seed, test in enumerate([0.75, 0.5, 1.0])
    ]
    experiment = ChatExperiment("prompts win", "method", (series,), "A note.", ("amazon",))
    section = markdown("sst2", experiment, [Row(series, job, tuple(made)), Row(series, job, ())])
    assert section[-4:] == [
        "| method | validation | test accuracy | by seed | amazon | learning rate | s a trial |",
        "|---|---|---|---|---|---|---|",
        "| prompt tuning | 0.500 ± 0.000 | 0.750 ± 0.250 | 0.750, 0.500, 1.000 "
        "| 0.500 ± 0.250 (-0.250) | 0.05 | 10 |",
        "| prompt tuning | no result | | | | | |",
    ]
    text = "\n".join(section)
    assert "Claim: prompts win." in text and "A note." in text
    assert f"{job.train.steps} steps of {job.train.batch_size} rows" in text
    assert "at most 1000 train, 80 validation, 200 test rows" in text


def test_all_tables_come_from_saved_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """experiments-tables trains nothing; it writes the sections of what has been run."""
    monkeypatch.chdir(tmp_path)
    experiment = EXPERIMENTS["init"]
    for row in chat_model.rows_of(experiment, REAL, (), "", lambda job: None):
        for seed in (0, 1, 2):
            for rate in (0.01, 0.05):
                save(one_trial(row.job, seed, rate), seed / 10 + rate, {})
    assert main(["experiments-tables"], tmp_path / "out") == 0
    shown = capsys.readouterr().out
    written = (chat_model.RESULTS / "init.md").read_text()
    assert "| random | 0.150 ± 0.100 | 0.150 ± 0.100 | 0.050, 0.150, 0.250 | 0.05 | 10 |" in written
    assert written in shown and "rte: no results yet" in shown
    assert (tmp_path / "out" / "experiments-tables.json").exists()


def test_what_has_been_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption only the missing trials are trained, and to the same result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_model, "JOBS", tmp_path)
    write_job(
        tmp_path,
        search__space={
            "init": ["random", "class_labels"],
            "num_virtual_tokens": 3,
            "learning_rate": [0.01, 0.3],
            "seed": [0, 1],
        },
        search__searcher="grid",
        search__trials=None,
        search__scheduler="fifo",
        search__few_shot=0,
        train__steps=2,
        train__evaluate_every=2,
    )
    series = [
        Series(init, "job", (f"search.space.init={init}",)) for init in ("random", "class_labels")
    ]
    experiment = ChatExperiment("", "init", tuple(series))
    first = run(experiment, Setting())
    files = sorted((chat_model.RESULTS / "trials").glob("*.json"))
    assert len(files) == 6 and [len(row.outcomes) for row in first] == [2, 2]
    times = {file: file.stat().st_mtime_ns for file in files}
    lost = files[0]
    lost.unlink()
    assert sum(len(row.outcomes) for row in finished(experiment, Setting())) < 4
    again = run(experiment, Setting())
    metrics = [[each.metrics for each in row.outcomes] for row in (*first, *again)]
    assert metrics[:2] == metrics[2:]
    changed = {file for file in files if file.stat().st_mtime_ns != times[file]}
    assert changed == {lost}
