"""Reading a job file: values as written, every problem at once, each with its line and the way out."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.errors import Problem, SpecError
from orchestrator.job_file import SKELETON, load_job
from orchestrator.spec import DataFiles, JobSpec, LogUniform, TextInit

GOOD = """\
name: sms-spam
base_model:
  id: builtin:quickstart
data:
  path: ucirvine/sms_spam
  template: "{text}\\nSpam or not?"
  target: label
  verbalizer: {0: " ham", 1: " spam"}
search:
  space:
    learning_rate: 0.1
train:
  steps: 100
"""


class Files:
    """Job files in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "job.yaml"

    def load(self, text: str | bytes, overrides: Sequence[str] = ()) -> JobSpec:
        """The job spec in ``text``."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_job(self.path, overrides)

    def problems(self, text: str | bytes, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
        """What is wrong with ``text``; fails when nothing is."""
        with pytest.raises(SpecError) as caught:
            self.load(text, overrides)
        return caught.value.problems

    def problem(self, text: str | bytes, overrides: Sequence[str] = ()) -> Problem:
        """The only thing that is wrong with ``text``."""
        problems = self.problems(text, overrides)
        assert len(problems) == 1, problems
        return problems[0]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A place for job files."""
    return Files(tmp_path)


def swap(old: str, new: str) -> str:
    """GOOD with one part replaced."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_good_file_loads(files: Files) -> None:
    """Values arrive as written, defaults fill the rest; str and Path both name a file."""
    spec = files.load(GOOD)
    assert (spec.name, spec.train.steps, spec.train.batch_size) == ("sms-spam", 100, 16)
    assert spec.data.verbalizer == {0: " ham", 1: " spam"}
    assert load_job(str(files.path)) == spec


def test_yes_and_no_are_words(files: Files) -> None:
    """YAML 1.1 would read both as truth values; a verbalizer needs them as text."""
    spec = files.load(swap('{0: " ham", 1: " spam"}', "{0: no, 1: yes, on: off}"))
    assert spec.data.verbalizer == {0: "no", 1: "yes", "on": "off"}


@pytest.mark.parametrize("text", ["1e-3", ".001", "1E-3", "+1.0e-3", "0.001"])
def test_every_spelling_of_a_float_is_a_number(files: Files, text: str) -> None:
    """1e-3 needs no point, as YAML 1.1 wants."""
    assert files.load(swap("0.1", text)).search.space.learning_rate == 0.001


@pytest.mark.parametrize("text", ["010", "0x1F", "0o17", "1_000", "12:30:45", "2024-01-31", "=", "y"])
def test_what_yaml_1_1_reads_as_something_else_stays_text(files: Files, text: str) -> None:
    """Octal, hexadecimal, underscored and sexagesimal numbers and dates are the text that was written."""
    assert files.load(swap("target: label", f"target: {text}")).data.target == text


def test_label_types_are_kept(files: Files) -> None:
    """A number, a truth value and a quoted number are three different labels."""
    verbalizer = files.load(swap('{0: " ham", 1: " spam"}', '{0: a, true: b, "1": c}')).data.verbalizer or {}
    assert [(type(label), text) for label, text in verbalizer.items()] == [(int, "a"), (bool, "b"), (str, "c")]


def test_aliases_and_merge_keys_work(files: Files) -> None:
    """An anchor's value can be used again, and << fills in keys that are not given."""
    text = swap('{0: " ham", 1: " spam"}', "&words {0: a, 1: b}\n  limit: &limit {train: 5, test: 3}")
    text = text.replace("  template", "  rename: {<<: {a: b, c: d}, a: z}\n  template")
    spec = files.load(text)
    assert spec.data.rename == {"a": "z", "c": "d"}
    shared = swap("learning_rate: 0.1", "init: [&t {text: hi}, random]\n    seed: 1").replace("steps: 100", "steps: 9")
    assert files.load(shared + "  evaluate_every: 3\n").search.space.init == [TextInit(text="hi"), "random"]


def test_a_merged_key_is_checked_like_a_written_one(files: Files) -> None:
    """A wrong value that comes in through << is reported at the line it stands on."""
    text = swap("steps: 100", "<<: &more\n    batch_size: 0\n  steps: 100")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (14, "train.batch_size")


def test_a_byte_order_mark_is_ignored(files: Files) -> None:
    """Editors that start a file with one make no difference."""
    assert files.load(b"\xef\xbb\xbf" + GOOD.encode()).name == "sms-spam"


# -- files that are no job spec -----------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest_one(files: Files) -> None:
    """A wrong name gets one message, exit code 2 and the file that was probably meant."""
    files.load(GOOD)
    with pytest.raises(SpecError, match="there is no such file") as caught:
        load_job(files.path.with_name("jbo.yaml"))
    assert caught.value.exit_code == 2
    assert "job.yaml?" in caught.value.problems[0].hint
    with pytest.raises(SpecError, match="orchestrator init"):
        load_job(files.path.parent / "nowhere" / "job.yaml")


def test_a_folder_is_no_job_spec(tmp_path: Path) -> None:
    """A folder gets one message."""
    with pytest.raises(SpecError, match="is a folder"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"", None, "is empty"),
        (b"# only a comment\n", None, "is empty"),
        (b"- name: x\n", 1, "is not a job spec"),
        (b"just text", 1, "is not a job spec"),
        (b"name: x\ndata:\n  a: b\n c: d\n", 4, "is not valid YAML"),
        (b"name: x\ndata:\n\ta: b\n", 3, "is not valid YAML"),
        (b"name: [x\n", 2, "is not valid YAML"),
        (b"name: x\n---\nname: y\n", 2, "is not valid YAML"),
        (b"name: *nowhere\n", 1, "undefined alias"),
        (b"name: x\nother: \xff\n", 2, "is not UTF-8 text: byte 0xff"),
        (b"name: x\nother: \x00\n", 2, "character U+0000 is not allowed"),
        (b"a: " + b"[" * 5000, None, "nested too deeply"),
        (b"a: " + b"[" * 60 + b"]" * 60, None, "nested too deeply"),
        (b"a: 1\n" * 300_000, None, "this is no job spec"),
    ],
)
def test_text_that_is_no_job_spec_gets_one_clear_message(
    files: Files, text: bytes, line: int | None, message: str
) -> None:
    """Empty, not a mapping, not YAML, not UTF-8, too deep, too large: one problem, with its line where there is one."""
    problem = files.problem(text)
    assert message in problem.message
    assert problem.line == line


def test_an_alias_of_its_own_parent_is_refused(files: Files) -> None:
    """A value that holds itself is reported instead of read for ever."""
    problem = files.problem(swap("label", "&loop [*loop]"))
    assert (problem.line, problem.where) == (7, "data.target[0]")
    assert "alias" in problem.message
    assert (
        "<< takes" in files.problem(swap("steps: 100", "&train\n  <<: *train").replace("train: &", "train: &")).message
    )


def test_aliases_that_multiply_are_refused(files: Files) -> None:
    """A few lines that stand for billions of values are refused quickly."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "values, aliases counted" in files.problem("\n".join(lines)).message
    merges = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    assert "values, aliases counted" in files.problem("\n".join(merges)).message


@pytest.mark.parametrize(
    "value", ["!!python/object:os.system x", "!local 5", "!!set {a, b}", "!!int five", "!!binary eA=="]
)
def test_tags_are_refused(files: Files, value: str) -> None:
    """No tag makes an object; a plain type's tag must fit."""
    problem = files.problem(swap("label", value))
    assert (problem.line, problem.where) == (7, "data.target")
    assert "tag" in problem.message


# -- problems of values -------------------------------------------------------------------------------------------

BAD = """\
name: has spaces
base_model:
  idd: Qwen/Qwen2.5-0.5B
  dtype: float23
data:
  path: a.jsonl
  template: Spam or not?
  verbalizer:
    0: 7
    0.5: half
  limit:
search:
  space:
    init: [random, clas_labels]
    num_virtual_tokens: [5, "20"]
    learning_rate:
      loguniform: [0.5, 0.003]
  trials: true
  metric: loss
  mode: max
registry:
  alias: v3
"""


def test_every_problem_of_a_file_is_reported_at_once(files: Files) -> None:
    """Unknown and missing keys, wrong types, bad choices, bad ranges and conflicts come together, in line order."""
    assert [(problem.line, problem.where) for problem in files.problems(BAD)] == [
        (1, "name"),
        (3, "base_model.idd"),
        (4, "base_model.dtype"),
        (5, "data.target"),
        (7, "data.template"),
        (9, "data.verbalizer.0"),
        (10, "data.verbalizer.0.5"),
        (11, "data.limit"),
        (14, "search.space.init[1]"),
        (15, "search.space.num_virtual_tokens[1]"),
        (17, "search.space.learning_rate.loguniform"),
        (18, "search.trials"),
        (20, "search.mode"),
        (22, "registry.alias"),
    ]


def test_a_problem_reads_as_place_key_value_and_what_is_allowed(files: Files) -> None:
    """The whole line, as a user sees it."""
    problem = files.problem(swap("0.1", "-1"))
    allowed = "a number above 0, a list of them, {loguniform: [low, high]} or {uniform: [low, high]}"
    assert str(problem) == f"{files.path}:11: search.space.learning_rate: -1 is not allowed; allowed: {allowed}"


def test_an_unknown_key_names_the_nearest_and_the_allowed_ones(files: Files) -> None:
    """A typo gets one message, on the key's own line, and the required key it stands for is not missing as well."""
    problem = files.problem(swap("template:", "templat:"))
    assert (problem.line, problem.where, problem.message) == (6, "data.templat", "unknown key")
    assert problem.hint.startswith("did you mean template? allowed: path, subset, ")


def test_a_key_in_the_wrong_section_names_the_right_one(files: Files) -> None:
    """A known key that stands elsewhere is found by its name."""
    problem = files.problem(GOOD + "  learning_rate: 0.1\n")
    assert problem.hint.startswith("did you mean search.space.learning_rate? allowed: steps, ")


def test_missing_required_keys_point_at_their_section(files: Files) -> None:
    """Each missing key is named, at the line of the section it belongs to."""
    problems = files.problems("# a comment\nname: x\ndata:\n  path: a\n  template: '{text}'\nsearch: {metric: loss}\n")
    assert [(problem.line, problem.where) for problem in problems] == [(2, "base_model"), (3, "data.target")]
    assert all("is missing" in problem.message for problem in problems)


@pytest.mark.parametrize("value", ['"5"', "true", "5.0", "0", "[]", "{a: 1}", "null", ""])
def test_a_wrong_type_gets_one_sentence(files: Files, value: str) -> None:
    """Text, truth values, floats, numbers out of range, lists, mappings and nothing are no number of steps."""
    problem = files.problem(swap("steps: 100", f"steps: {value}"))
    assert (problem.line, problem.where) == (13, "train.steps")
    assert problem.message.endswith("is not allowed; allowed: a whole number of at least 1")


def test_quotes_too_many_or_missing_are_named(files: Files) -> None:
    """A number in quotes and a number where text belongs get the hint that helps."""
    assert files.problem(swap("100", '"100"')).hint == "remove the quotes"
    assert files.problem(swap("target: label", "target: 5")).hint == "put it in quotes"


def test_the_nearest_choice_is_named(files: Files) -> None:
    """A misspelt choice gets all choices and the nearest."""
    problem = files.problem(swap("steps: 100", "optimizer: AdamWW"))
    assert problem.message == '"AdamWW" is not allowed; allowed: adamw or adafactor'
    assert problem.hint == "did you mean adamw?"


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        ("{loguniform: [0.1]}", ".loguniform", "[0.1] is not allowed; allowed: [low, high]"),
        ("{loguniform: [0.1, x]}", ".loguniform[1]", '"x" is not allowed; allowed: a number above 0'),
        ("{loguniform: [2, 1]}", ".loguniform", "[2, 1] is not a range; write the smaller bound first"),
        ("{logunifrom: [1, 2]}", ".logunifrom", "unknown key"),
        ("{loguniform: [1, 2], uniform: [1, 2]}", ".uniform", "unknown key"),
        ("[0.1, 0]", "[1]", "0 is not allowed; allowed: a number above 0"),
        ("[0.1, 0.1]", "", "[0.1, 0.1] lists 0.1 twice; list each value once"),
        (".nan", "", "NaN is not allowed; allowed: a number above 0, a list of them, "),
        ("fast", "", '"fast" is not allowed; allowed: a number above 0, a list of them, '),
        ("{choice: [1, 2]}", "", '{"choice": [1, 2]} is not allowed; allowed: a number above 0, a list of them, '),
    ],
)
def test_a_union_gets_one_message_at_the_part_that_is_wrong(files: Files, value: str, where: str, message: str) -> None:
    """A learning rate may have four shapes; a bad one is explained by the shape it was meant to have."""
    problem = files.problem(swap("0.1", value))
    assert (problem.line, problem.where) == (11, f"search.space.learning_rate{where}")
    assert problem.message.startswith(message)


def test_a_section_that_is_empty_or_no_mapping_is_explained(files: Files) -> None:
    """A section whose keys are all commented out is refused with what to do."""
    problem = files.problem(swap("  steps: 100\n", "  # steps: 100\n"))
    assert (problem.line, problem.where) == (12, "train")
    assert "null is not allowed; allowed: a mapping with the keys steps, " in problem.message
    assert problem.hint == "leave the key out to take the defaults"


def test_duplicate_keys_are_problems(files: Files) -> None:
    """The second of two equal keys is reported with the line of the first, at any depth."""
    problems = files.problems(GOOD + "  steps: 300\nname: other\n")
    assert [(problem.line, problem.where) for problem in problems] == [(14, "train.steps"), (15, "name")]
    assert "first on line 13" in problems[0].message


def test_keys_that_are_no_text_are_problems(files: Files) -> None:
    """Lists and nothing can't be keys; a number can, and is unknown like any other word."""
    assert "can't be a key" in files.problem(GOOD + "? [a, b]\n: c\n").message
    assert "can't be a key" in files.problem(GOOD + "~: c\n").message
    assert files.problem(GOOD + "5: c\n").where == "5"


def test_accuracy_without_a_verbalizer_points_at_what_is_there(files: Files) -> None:
    """The metric's line when it is written, else the section where the verbalizer belongs."""
    text = swap('  verbalizer: {0: " ham", 1: " spam"}\n', "")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (4, "data.verbalizer")
    problem = files.problem(text.replace("search:\n", "search:\n  metric: accuracy\n"))
    assert (problem.line, problem.where) == (9, "search.metric")
    assert "needs data.verbalizer" in problem.message


def test_a_grid_with_a_range_is_refused_at_the_searcher(files: Files) -> None:
    """The conflict stands at the searcher's line and names the range."""
    text = swap("    learning_rate: 0.1\n", "    learning_rate: {uniform: [0.1, 0.2]}\n  searcher: grid\n")
    problem = files.problem(text)
    assert (problem.line, problem.where) == (12, "search.searcher")
    assert "space.learning_rate" in problem.message


def test_a_reserved_alias_is_refused(files: Files) -> None:
    """MLflow keeps latest for itself."""
    problem = files.problem(GOOD + "registry: {alias: latest}\n")
    assert (problem.line, problem.where) == (14, "registry.alias")
    assert "reserved by MLflow" in problem.message


def test_conflicts_in_different_sections_are_reported_together(files: Files) -> None:
    """A conflict inside search does not hide the one between train's keys."""
    text = swap("search:\n", "search:\n  mode: min\n").replace("steps: 100", "evaluate_every: 7\n  steps: 5")
    assert [problem.where for problem in files.problems(text)] == ["search.mode", "train.evaluate_every"]


def test_what_depends_on_a_bad_value_is_not_judged(files: Files) -> None:
    """A misspelt verbalizer is one problem; that the metric needs one is not said on top."""
    assert files.problem(swap("verbalizer:", "verbaliser:")).where == "data.verbaliser"
    assert files.problem(swap("steps: 100", "steps: -1\n  evaluate_every: 900")).where == "train.steps"


def test_a_verbalizer_of_thousands_with_one_mistake_is_explained(files: Files) -> None:
    """The one bad text among many is named, in good time."""
    rows = "".join(f"    {n}: {'word' if n != 1234 else 5}\n" for n in range(3000))
    problem = files.problem(swap('  verbalizer: {0: " ham", 1: " spam"}\n', f"  verbalizer:\n{rows}"))
    assert (problem.line, problem.where) == (9 + 1234, "data.verbalizer.1234")


# -- overrides ----------------------------------------------------------------------------------------------------


def test_an_override_sets_a_key_and_makes_the_mappings_on_the_way(files: Files) -> None:
    """Later overrides win; values are read as in the file."""
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
    """A hub data set becomes files; a second override adds to the first."""
    spec = files.load(GOOD, ["data.path.train=a.jsonl", "data.path.test=b.csv"])
    assert spec.data.path == DataFiles(train="a.jsonl", test="b.csv")


def test_an_override_reaches_typed_and_quoted_keys(files: Files) -> None:
    """A number in a key is a number as in YAML; quotes make text of it and keep dots together."""
    spec = files.load(GOOD, ["data.verbalizer.0= ' good'", 'data.verbalizer."1"=x', 'data.rename."a.b=c"=text'])
    assert spec.data.verbalizer == {0: " good", 1: " spam", "1": "x"}
    assert spec.data.rename == {"a.b=c": "text"}


def test_a_value_may_hold_equals_signs_and_braces(files: Files) -> None:
    """Only the first = separates; text that YAML would read otherwise stands in quotes."""
    assert files.load(GOOD, ['data.template="{text} = ?\\n"']).data.template == "{text} = ?\n"
    assert files.load(GOOD, ["data.target=a=b"]).data.target == "a=b"


def test_an_override_mends_a_bad_value_of_the_file(files: Files) -> None:
    """What an override replaces is not reported."""
    assert files.load(swap("100", "-1"), ["train.steps=5", "train.evaluate_every=5"]).train.steps == 5


def test_an_unknown_key_of_an_override_names_the_override(files: Files) -> None:
    """The place of the problem is the override itself, without a line."""
    problem = files.problem(GOOD, ["data.foo=1"])
    assert (problem.file, problem.line, problem.where) == ("--set data.foo=1", None, "data.foo")
    assert "allowed: path, subset" in problem.hint
    assert files.problem(GOOD, ["train.step=1"]).hint.startswith("did you mean steps?")


def test_a_bad_value_of_an_override_names_the_override(files: Files) -> None:
    """Wrong values, values inside values and conflicts all point at the override, after the file's own problems."""
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
    """No =, no key, and values that are not YAML on one line are reported with the override as their place."""
    problem = files.problems(GOOD, [override])[0]
    assert problem.file == f"--set {override}"
    assert message in problem.message


def test_an_override_inside_a_list_is_refused(files: Files) -> None:
    """Lists are set as a whole."""
    problem = files.problem(swap("0.1", "[0.1, 0.2]"), ["search.space.learning_rate.0=0.3"])
    assert problem.message == "search.space.learning_rate is a list; set it as a whole"


# -- the whole ----------------------------------------------------------------------------------------------------


def test_a_spec_error_survives_pickle(files: Files) -> None:
    """Problems arrive whole when the error crosses a process."""
    with pytest.raises(SpecError) as caught:
        files.load(BAD)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)


def test_the_skeleton_is_the_smallest_job() -> None:
    """The stand-in for missing keys holds every required key and no other."""
    JobSpec.model_validate(SKELETON | {"search": {"metric": "loss"}})
    for section, value in SKELETON.items():
        for key in value if isinstance(value, dict) else []:
            smaller = SKELETON | {section: {k: v for k, v in value.items() if k != key}}
            with pytest.raises(ValidationError, match="Field required"):
                JobSpec.model_validate(smaller | {"search": {"metric": "loss"}})


def test_reading_a_job_imports_nothing_heavy() -> None:
    """Neither torch nor Ray nor their kin load with the job spec."""
    code = "import sys, orchestrator.job_file, orchestrator.space; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "mlflow", "datasets", "numpy"} & set(modules)


FULL: dict[str, Any] = {
    "name": "x",
    "base_model": {"id": "x", "revision": "main", "dtype": "auto"},
    "data": {
        "path": {"train": "a.jsonl", "test": "b"},
        "rename": {"a": "b"},
        "template": "{text}",
        "target": "y",
        "verbalizer": {0: "a", True: "b", "c": "d"},
        "validation_fraction": 0.2,
        "limit": {"train": 5},
    },
    "search": {
        "space": {
            "init": ["random", {"text": "a"}],
            "num_virtual_tokens": [5, 20],
            "learning_rate": {"loguniform": [0.1, 1]},
            "seed": 0,
        },
        "trials": 4,
        "searcher": "random",
        "metric": "accuracy",
        "mode": "max",
        "stop": {"metric": 0.5, "minutes": 3},
    },
    "train": {"steps": 100, "evaluate_every": 10, "weight_decay": 0.0},
    "resources": {"workers": "auto", "gpus_per_worker": 0.5},
    "registry": {"model": "m", "alias": "challenger"},
}

numbers = st.sampled_from([0, 1, -1, 5, 10**12, 0.5, 1.5, -0.0, math.inf, math.nan])
words = st.sampled_from(["", "5", "auto", "random", "class_labels", "latest", "min", "grid", "exact_match", "loss"])
oddities = st.sampled_from([None, True, False, "x y", "{a}", "{", "\x00", "\ud800"])
atoms = numbers | words | oddities
keys = st.sampled_from(["init", "text", "loguniform", "steps", "x", "train", "", "a.b", 0, 1, True, "verbalizer"])
values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """FULL with a few values replaced, removed or added anywhere."""

    def change(value: Any, depth: int) -> Any:
        if depth == 0 or not isinstance(value, dict | list) or not value:
            return draw(values)
        if isinstance(value, list):
            index = draw(st.integers(0, len(value) - 1))
            return [change(item, depth - 1) if i == index else item for i, item in enumerate(value)]
        key = draw(st.sampled_from(list(value)))
        match draw(st.sampled_from(["change", "change", "change", "remove", "add"])):
            case "remove":
                return {name: inner for name, inner in value.items() if name != key}
            case "add":
                return value | {draw(keys): draw(values)}
        return value | {key: change(value[key], depth - 1)}

    job: Any = FULL
    for _ in range(draw(st.integers(0, 4))):
        job = change(job, draw(st.integers(1, 5)))
    return job


def accepted(job: Any) -> bool:
    """Whether the models themselves take the job."""
    try:
        JobSpec.model_validate(job)
        return True
    except ValidationError:
        return False


@given(job=mutated())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_file_loads_exactly_when_the_models_accept_it(files: Files, job: Any) -> None:
    """Every refusal of the models is explained in words of our own, and nothing else is refused."""
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=False, default_flow_style=None)
    if accepted(job):
        assert files.load(text) == JobSpec.model_validate(job)
        return
    for problem in files.problems(text):
        str(problem).encode()  # printable, whatever the file holds
        assert "Input should" not in problem.message  # pydantic's words, from the last resort
        assert problem.file == str(files.path)


@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_loads_or_gives_problems(files: Files, text: str) -> None:
    """No file and no override, however odd, ends in another error."""
    with pytest.raises(SpecError):
        files.load(text.encode("utf-8", "surrogatepass"))
    try:
        files.load(GOOD, [text, f"data.target={text}"])
    except SpecError as error:
        str(error).encode()
