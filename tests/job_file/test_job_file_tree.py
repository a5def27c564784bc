"""From YAML text to values: how scalars are read, and what never reaches a model."""

from __future__ import annotations

import pytest
from job_texts import GOOD, Files, swap

from orchestrator.job.spec import TextInit


def test_yes_and_no_are_words(files: Files) -> None:
    """YAML 1.1 would read both as booleans; a verbalizer needs them as text."""
    spec = files.load(swap('{0: " ham", 1: " spam"}', "{0: no, 1: yes, on: off}"))
    assert spec.data.verbalizer == {0: "no", 1: "yes", "on": "off"}


@pytest.mark.parametrize("text", ["1e-3", ".001", "1E-3", "+1.0e-3", "0.001"])
def test_every_spelling_of_a_float_is_a_number(files: Files, text: str) -> None:
    """1e-3 is a number without a point, which YAML 1.1 would require."""
    assert files.load(swap("0.1", text)).search.space.learning_rate == 0.001


@pytest.mark.parametrize(
    "text", ["010", "0x1F", "0o17", "1_000", "12:30:45", "2024-01-31", "=", "y"]
)
def test_what_yaml_1_1_reads_as_something_else_stays_text(files: Files, text: str) -> None:
    """Octal, hexadecimal, underscored and sexagesimal numbers and dates stay text."""
    assert files.load(swap("target: label", f"target: {text}")).data.target == text


def test_label_types_are_kept(files: Files) -> None:
    """A number, a boolean and a quoted number are three different labels."""
    verbalizer = (
        files.load(swap('{0: " ham", 1: " spam"}', '{0: a, true: b, "1": c}')).data.verbalizer or {}
    )
    assert [(type(label), text) for label, text in verbalizer.items()] == [
        (int, "a"),
        (bool, "b"),
        (str, "c"),
    ]


def test_aliases_and_merge_keys_work(files: Files) -> None:
    """An anchor's value can be used again; << fills in missing keys."""
    text = swap(
        '{0: " ham", 1: " spam"}', "&words {0: a, 1: b}\n  limit: &limit {train: 5, test: 3}"
    )
    text = text.replace("  template", "  where: {<<: {a: b, c: d}, a: z}\n  template")
    spec = files.load(text)
    assert spec.data.where == {"a": "z", "c": "d"}
    shared = swap("learning_rate: 0.1", "init: [&t {text: hi}, random]\n    seed: 1").replace(
        "steps: 100", "steps: 9"
    )
    assert files.load(shared + "  evaluate_every: 3\n").search.space.init == [
        TextInit(text="hi"),
        "random",
    ]


def test_a_merged_key_is_checked_like_a_written_one(files: Files) -> None:
    """A wrong value that comes in through << is reported at its own line."""
    text = swap("steps: 100", "<<: &more\n    batch_size: 0\n  steps: 100")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (14, "train.batch_size")


def test_duplicate_keys_are_problems(files: Files) -> None:
    """The second of two equal keys is reported with the first one's line, at any depth."""
    problems = files.problems(GOOD + "  steps: 300\nname: other\n")
    assert [(problem.line, problem.where) for problem in problems] == [
        (14, "train.steps"),
        (15, "name"),
    ]
    assert "first on line 13" in problems[0].message


def test_keys_that_are_no_text_are_problems(files: Files) -> None:
    """Lists and null can't be keys; a number can, and is unknown like any other word."""
    assert "can't be a key" in files.problem(GOOD + "? [a, b]\n: c\n").message
    assert "can't be a key" in files.problem(GOOD + "~: c\n").message
    assert files.problem(GOOD + "5: c\n").where == "5"


def test_an_alias_of_its_own_parent_is_refused(files: Files) -> None:
    """A value that contains itself is reported instead of being read for ever."""
    problem = files.problem(swap("label", "&loop [*loop]"))
    assert (problem.line, problem.where) == (7, "data.target[0]")
    assert "alias" in problem.message
    assert (
        "<< takes"
        in files.problem(
            swap("steps: 100", "&train\n  <<: *train").replace("train: &", "train: &")
        ).message
    )


def test_aliases_that_multiply_are_refused(files: Files) -> None:
    """A few lines that expand to billions of values are refused quickly."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "values, aliases counted" in files.problem("\n".join(lines)).message
    merges = ["a0: &a0 {x: 1}"] + [
        f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)
    ]
    assert "values, aliases counted" in files.problem("\n".join(merges)).message


@pytest.mark.parametrize(
    "value",
    ["!!python/object:os.system x", "!local 5", "!!set {a, b}", "!!int five", "!!binary eA=="],
)
def test_tags_are_refused(files: Files, value: str) -> None:
    """Tags create no objects; a plain type's tag is refused when it does not fit."""
    problem = files.problem(swap("label", value))
    assert (problem.line, problem.where) == (7, "data.target")
    assert "tag" in problem.message
