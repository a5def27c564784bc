"""All problems with a job's values are reported at once, each with its line and a remedy."""

from __future__ import annotations

import pytest
import yaml
from job_texts import BAD, GOOD, Files, swap

from orchestrator.job.metrics import names_of


def test_every_problem_of_a_file_is_reported_at_once(files: Files) -> None:
    """Unknown and missing keys, wrong types and values, and conflicts come in line order."""
    assert [(problem.line, problem.where) for problem in files.problems(BAD)] == [
        (1, "name"),
        (3, "base_model.idd"),
        (4, "base_model.dtype"),
        (5, "data.target"),
        (7, "data.template"),
        (9, "data.verbalizer.0"),
        (10, "data.verbalizer.Infinity"),
        (11, "data.limit"),
        (14, "search.space.init[1]"),
        (15, "search.space.num_virtual_tokens[1]"),
        (17, "search.space.learning_rate.loguniform"),
        (18, "search.trials"),
        (20, "search.mode"),
        (22, "registry.alias"),
    ]


def test_a_problem_reads_as_place_key_value_and_what_is_allowed(files: Files) -> None:
    """A problem's text is the whole line that a user sees."""
    problem = files.problem(swap("0.1", "-1"))
    allowed = (
        "a number above 0 and at most 1000, a list of them, "
        "{loguniform: [low, high]} or {uniform: [low, high]}"
    )
    assert (
        str(problem)
        == f"{files.path}:11: search.space.learning_rate: -1 is not allowed; allowed: {allowed}"
    )


def test_an_unknown_key_names_the_nearest_and_the_allowed_ones(files: Files) -> None:
    """A typo gets one message, at its own line.

    The required key for which it stands is not reported as missing as well.
    """
    problem = files.problem(swap("template:", "templat:"))
    assert (problem.line, problem.where, problem.message) == (6, "data.templat", "unknown key")
    assert problem.hint.startswith("did you mean template? allowed: path, subset, ")


def test_a_key_in_the_wrong_section_names_the_right_one(files: Files) -> None:
    """A known key in the wrong section gets a hint with its full name."""
    problem = files.problem(GOOD + "  learning_rate: 0.1\n")
    assert problem.hint.startswith("did you mean search.space.learning_rate? allowed: steps, ")


def test_missing_required_keys_point_at_their_section(files: Files) -> None:
    """Each missing key is reported at the line of its section."""
    problems = files.problems(
        "# a comment\nname: x\ndata:\n  path: a\n  template: '{text}'\nsearch: {metric: loss}\n"
    )
    assert [(problem.line, problem.where) for problem in problems] == [
        (2, "base_model"),
        (3, "data.target"),
    ]
    assert all("is missing" in problem.message for problem in problems)


@pytest.mark.parametrize("value", ['"5"', "true", "5.0", "0", "[]", "{a: 1}", "null", ""])
def test_a_wrong_type_gets_one_sentence(files: Files, value: str) -> None:
    """Any value that is no number of steps gets the same message.

    Text, booleans, floats, numbers out of range, lists, mappings and null are tried.
    """
    problem = files.problem(swap("steps: 100", f"steps: {value}"))
    assert (problem.line, problem.where) == (13, "train.steps")
    assert problem.message.endswith("is not allowed; allowed: a whole number of at least 1")


def test_quotes_too_many_or_missing_are_named(files: Files) -> None:
    """A quoted number, and a number where text belongs, get a helpful hint."""
    assert files.problem(swap("100", '"100"')).hint == "remove the quotes"
    assert files.problem(swap("target: label", "target: 5")).hint == "put it in quotes"


def test_the_nearest_choice_is_named(files: Files) -> None:
    """A misspelt choice gets all choices and the nearest one."""
    problem = files.problem(swap("steps: 100", "optimizer: AdamWW"))
    assert problem.message == '"AdamWW" is not allowed; allowed: adamw, adafactor or sgd'
    assert problem.hint == "did you mean adamw?"


def test_a_list_of_fixed_length_is_shown_by_example(files: Files) -> None:
    """A pair of the wrong length gets the allowed parts and an example.

    A bad part is reported by itself.
    """
    part = "a number of at least 0 and below 1"
    problem = files.problem(swap("steps: 100", "betas: [0.9]"))
    assert (
        problem.message
        == f"[0.9] is not allowed; allowed: a list of 2, each {part}, as [0.9, 0.999] or null"
    )
    problem = files.problem(swap("steps: 100", "betas: [0.9, 2]"))
    assert (problem.where, problem.message) == (
        "train.betas[1]",
        f"2 is not allowed; allowed: {part}",
    )


def test_a_train_setting_without_effect_is_named_with_the_way_out(files: Files) -> None:
    """The conflict names the key, the setting that disables it, and what to change."""
    problem = files.problem(GOOD + "  momentum: 0.9\n")
    assert problem.where == "train.momentum"
    assert problem.message == (
        "train.momentum has no effect with train.optimizer adamw; "
        "leave it out, or set train.optimizer to sgd"
    )


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        ("{loguniform: [0.1]}", ".loguniform", "[0.1] is not allowed; allowed: [low, high]"),
        (
            "{loguniform: [0.1, x]}",
            ".loguniform[1]",
            '"x" is not allowed; allowed: a number above 0 and at most 1000',
        ),
        (
            "{loguniform: [2, 1]}",
            ".loguniform",
            "[2, 1] is not a range; write the smaller bound first",
        ),
        ("{logunifrom: [1, 2]}", ".logunifrom", "unknown key"),
        ("{loguniform: [1, 2], uniform: [1, 2]}", ".uniform", "unknown key"),
        (
            "1.0e+38",
            "",
            "1e+38 is not allowed; allowed: a number above 0 and at most 1000, a list of them, ",
        ),
        ("[0.1, 1001]", "[1]", "1001 is not allowed; allowed: a number above 0 and at most 1000"),
        (
            "{uniform: [1, 1001]}",
            ".uniform[1]",
            "1001 is not allowed; allowed: a number above 0 and at most 1000",
        ),
        ("[0.1, 0]", "[1]", "0 is not allowed; allowed: a number above 0 and at most 1000"),
        ("[0.1, 0.1]", "", "[0.1, 0.1] lists 0.1 twice; list each value once"),
        (
            ".nan",
            "",
            "NaN is not allowed; allowed: a number above 0 and at most 1000, a list of them, ",
        ),
        (
            "fast",
            "",
            '"fast" is not allowed; allowed: a number above 0 and at most 1000, a list of them, ',
        ),
        (
            "{choice: [1, 2]}",
            "",
            '{"choice": [1, 2]} is not allowed; '
            "allowed: a number above 0 and at most 1000, a list of them, ",
        ),
    ],
)
def test_a_union_gets_one_message_at_the_part_that_is_wrong(
    files: Files, value: str, where: str, message: str
) -> None:
    """A bad learning rate is explained by the one of its four shapes that was meant."""
    problem = files.problem(swap("0.1", value))
    assert (problem.line, problem.where) == (11, f"search.space.learning_rate{where}")
    assert problem.message.startswith(message)


def test_a_section_that_is_empty_or_no_mapping_is_explained(files: Files) -> None:
    """A section whose keys are all commented out is refused with a remedy."""
    problem = files.problem(swap("  steps: 100\n", "  # steps: 100\n"))
    assert (problem.line, problem.where) == (12, "train")
    assert "null is not allowed; allowed: a mapping with the keys steps, " in problem.message
    assert problem.hint == "leave the key out to take the defaults"


def test_accuracy_without_a_verbalizer_points_at_what_is_there(files: Files) -> None:
    """The problem is at the metric if one is written, else at the verbalizer's section."""
    text = swap('  verbalizer: {0: " ham", 1: " spam"}\n', "")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (4, "data.verbalizer")
    problem = files.problem(text.replace("search:\n", "search:\n  metric: accuracy\n"))
    assert (problem.line, problem.where) == (9, "search.metric")
    assert "needs data.verbalizer" in problem.message


def test_a_text_metric_with_a_verbalizer_points_at_the_metric(files: Files) -> None:
    """The problem is at the metric's line and names both remedies.

    References beside a verbalizer are reported at their own line.
    """
    text = swap("search:\n", "search:\n  metric: bleu\n")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (10, "search.metric")
    assert "remove data.verbalizer, or set search.metric to accuracy" in problem.message
    problem = files.problem(swap("  target: label\n", "  target: label\n  references: texts\n"))
    assert (problem.line, problem.where) == (8, "data.references")


def test_an_unknown_metric_names_the_nearest(files: Files) -> None:
    """ "rouge" gets the hint rouge_l and the list of all metrics."""
    problem = files.problem(swap("search:\n", "search:\n  metric: rouge\n"))
    assert f"allowed: {', '.join(names_of())} or module:function" in problem.message
    assert problem.hint == "did you mean rouge_l?"


def test_a_grid_with_a_range_is_refused_at_the_searcher(files: Files) -> None:
    """The conflict is at the searcher's line and names the range."""
    text = swap(
        "    learning_rate: 0.1\n", "    learning_rate: {uniform: [0.1, 0.2]}\n  searcher: grid\n"
    )
    problem = files.problem(text)
    assert (problem.line, problem.where) == (12, "search.searcher")
    assert "space.learning_rate" in problem.message


def test_a_reserved_alias_is_refused(files: Files) -> None:
    """ "latest" is reserved by MLflow."""
    problem = files.problem(GOOD + "registry: {alias: latest}\n")
    assert (problem.line, problem.where) == (14, "registry.alias")
    assert "reserved by MLflow" in problem.message


def test_an_alias_with_a_dot_is_refused(files: Files) -> None:
    """MLflow allows dots in a model's name but not in an alias."""
    problem = files.problem(GOOD + "registry: {alias: v1.2}\n")
    allowed = "letters, digits, '_' and '-', a letter or digit first, 100 at most"
    assert (problem.where, problem.message) == (
        "registry.alias",
        f'"v1.2" is not allowed; allowed: {allowed}',
    )


def test_conflicts_in_different_sections_are_reported_together(files: Files) -> None:
    """A conflict inside search does not hide one between keys of train."""
    text = swap("search:\n", "search:\n  mode: min\n").replace(
        "steps: 100", "evaluate_every: 7\n  steps: 5"
    )
    assert [problem.where for problem in files.problems(text)] == [
        "search.mode",
        "train.evaluate_every",
    ]


@pytest.mark.parametrize(
    "key", ["name", "base_model", "base_model.id", "data.path", "data.template", "data.target"]
)
def test_a_missing_key_hides_no_conflict_of_other_keys(files: Files, key: str) -> None:
    """Without any one of the required keys, the others are still checked against each other."""
    job = yaml.safe_load(GOOD + "  evaluate_every: 900\n")
    *way, last = key.split(".")
    del (job[way[0]] if way else job)[last]
    assert {problem.where for problem in files.problems(yaml.safe_dump(job))} == {
        key,
        "train.evaluate_every",
    }


def test_what_depends_on_a_bad_value_is_not_judged(files: Files) -> None:
    """A misspelt verbalizer is the only problem; a metric that needs one is not reported too."""
    assert files.problem(swap("verbalizer:", "verbaliser:")).where == "data.verbaliser"
    assert (
        files.problem(swap("steps: 100", "steps: -1\n  evaluate_every: 900")).where == "train.steps"
    )


def test_a_verbalizer_of_thousands_with_one_mistake_is_explained(files: Files) -> None:
    """One bad text among thousands is found quickly."""
    rows = "".join(f"    {n}: {'word' if n != 1234 else 5}\n" for n in range(3000))
    problem = files.problem(
        swap('  verbalizer: {0: " ham", 1: " spam"}\n', f"  verbalizer:\n{rows}")
    )
    assert (problem.line, problem.where) == (9 + 1234, "data.verbalizer.1234")


@pytest.mark.parametrize(
    ("more", "section"),
    [
        ("", "data:\n  prefix_lm: body\n"),
        ("method: prefix_tuning\n", "data:\n"),
        ("method: lora\n", "data:\n"),
    ],
)
def test_a_bad_template_is_one_problem_whatever_reads_it(
    files: Files, more: str, section: str
) -> None:
    """Checks that use the template are skipped when it can't be read."""
    text = GOOD.replace('template: "{text}\\nSpam or not?"', "template: {text}").replace(
        "data:\n", section
    )
    found = [problem.where for problem in files.problems(more + text)]
    assert found.count("data.template") == 1
