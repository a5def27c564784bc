"""Values that --set puts over a file's."""

from __future__ import annotations

import pytest
from job_texts import GOOD, Files, swap

from orchestrator.job.spec import DataFiles, LogUniform


def test_an_override_sets_a_key_and_makes_the_mappings_on_the_way(files: Files) -> None:
    """Later overrides win; values are read as in the file, and missing mappings are created."""
    overrides = [
        "train.steps=7",
        "train.steps=9",
        "train.evaluate_every=3",
        "search.space.learning_rate={loguniform: [1e-3, .5]}",
        "search.space.num_virtual_tokens=[5, 20]",
        "search.stop.metric=0.9",
        "registry.model=no",
        "data.subset=",
    ]
    spec = files.load(GOOD, overrides)
    assert (spec.train.steps, spec.search.stop.metric, spec.model_name) == (9, 0.9, "no")
    assert spec.search.space.learning_rate == LogUniform(loguniform=(0.001, 0.5))
    assert spec.search.space.num_virtual_tokens == [5, 20]
    assert spec.data.subset is None


def test_an_override_below_a_scalar_replaces_the_scalar(files: Files) -> None:
    """A hub data set is replaced by files; a second override adds to the first."""
    spec = files.load(GOOD, ["data.path.train=a.jsonl", "data.path.test=b.csv"])
    assert spec.data.path == DataFiles(train="a.jsonl", test="b.csv")


def test_an_override_reaches_typed_and_quoted_keys(files: Files) -> None:
    """A number in a key is a number, as in YAML; quotes make it text and protect dots."""
    spec = files.load(
        GOOD, ["data.verbalizer.0= ' good'", 'data.verbalizer."2"=x', 'data.rename."a.b=c"=text']
    )
    assert spec.data.verbalizer == {0: " good", 1: " spam", "2": "x"}
    assert spec.data.rename == {"a.b=c": "text"}


def test_a_value_may_hold_equals_signs_and_braces(files: Files) -> None:
    """Only the first = separates; text with a meaning in YAML needs quotes."""
    assert files.load(GOOD, ['data.template="{text} = ?\\n"']).data.template == "{text} = ?\n"
    assert files.load(GOOD, ["data.target=a=b"]).data.target == "a=b"


def test_an_override_mends_a_bad_value_of_the_file(files: Files) -> None:
    """A value that an override replaces is not reported."""
    assert (
        files.load(swap("100", "-1"), ["train.steps=5", "train.evaluate_every=5"]).train.steps == 5
    )


def test_an_override_mends_what_could_not_be_read(files: Files) -> None:
    """Tags, duplicate keys and earlier overrides are gone with the value that is replaced."""
    assert (
        files.load(
            swap("100", "!x 100\n  steps: 100"), ["train.steps=[1", "train.steps=50"]
        ).train.steps
        == 50
    )


def test_an_override_changes_one_use_of_an_alias(files: Files) -> None:
    """Other uses of the anchor keep their value, merged in or not."""
    text = swap(
        "path: ucirvine/sms_spam",
        "path: &files {train: a}\n  where: {<<: *files}\n  limit: &limit {train: 5}",
    )
    spec = files.load(text, ["data.path.train=b", "data.where.x=y"])
    assert (spec.data.path, spec.data.where) == (DataFiles(train="b"), {"train": "a", "x": "y"})


def test_an_unknown_key_of_an_override_names_the_override(files: Files) -> None:
    """The problem's place is the override, without a line."""
    problem = files.problem(GOOD, ["data.foo=1"])
    assert (problem.file, problem.line, problem.where) == ("--set data.foo=1", None, "data.foo")
    assert "allowed: path, subset" in problem.hint
    assert files.problem(GOOD, ["train.step=1"]).hint.startswith("did you mean steps?")


def test_a_bad_value_of_an_override_names_the_override(files: Files) -> None:
    """Wrong values, nested values and conflicts are placed at the override.

    They come after the file's own problems.
    """
    problem = files.problem(GOOD, ["search.space={seed: [0, -1]}"])
    assert (problem.file, problem.line) == ("--set search.space={seed: [0, -1]}", None)
    assert problem.where == "search.space.seed[1]"
    problem = files.problem(GOOD, ["train.evaluate_every=101"])
    assert (problem.file, problem.line) == ("--set train.evaluate_every=101", None)
    problem = files.problem(GOOD, ["train.steps=20"])
    assert (problem.file, problem.where) == ("--set train.steps=20", "train.evaluate_every")
    problems = files.problems(swap("steps: 100", "steps: 0"), ["search.trials=0"])
    assert [(problem.file, problem.line) for problem in problems] == [
        (str(files.path), 13),
        ("--set search.trials=0", None),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "has no ="),
        ("", "has no ="),
        ("=5", "names no key"),
        ("train..steps=5", "names no key"),
        (".steps=5", "names no key"),
        ("train.=5", "names no key"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=a: b", "neither a scalar"),
        ("train.steps=- 5", "neither a scalar"),
        ("train.steps=!x 5", "tag"),
        ("train.steps=*x", "undefined alias"),
        ("train.steps={a: 1, a: 1}", "is given twice"),
        ("train.steps=" + "[" * 60 + "]" * 60, "the value is nested too deeply"),
        ("train.steps=" + "[" * 5000, "the value is nested too deeply"),
    ],
)
def test_a_malformed_override_is_a_problem(files: Files, override: str, message: str) -> None:
    """An override without = or key, or with a value that is no YAML, is reported by itself."""
    problem = files.problems(GOOD, [override])[0]
    assert problem.file == f"--set {override}"
    assert message in problem.message


def test_an_override_inside_a_list_is_refused(files: Files) -> None:
    """A list can only be set as a whole."""
    problem = files.problem(swap("0.1", "[0.1, 0.2]"), ["search.space.learning_rate.0=0.3"])
    assert problem.message == "search.space.learning_rate is a list; set it as a whole"
