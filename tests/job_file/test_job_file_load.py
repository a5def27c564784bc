"""Whole files: a good one loads, and one that is no job spec gets one clear message."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from job_texts import BAD, GOOD, Files

from orchestrator.errors import SpecError
from orchestrator.job.yaml import load_job


def test_a_good_file_loads(files: Files) -> None:
    """Values are read as written, with defaults for the rest; the path may be str or Path."""
    spec = files.load(GOOD)
    assert (spec.name, spec.train.steps, spec.train.batch_size) == ("sms-spam", 100, 16)
    assert spec.data.verbalizer == {0: " ham", 1: " spam"}
    assert load_job(str(files.path)) == spec


def test_a_byte_order_mark_is_ignored(files: Files) -> None:
    """A byte order mark at the start of a file, as some editors write it, is ignored."""
    assert files.load(b"\xef\xbb\xbf" + GOOD.encode()).name == "sms-spam"


def test_a_missing_file_names_the_nearest_one(files: Files) -> None:
    """A wrong name gets one message, exit code 2 and the most similar file."""
    files.load(GOOD)
    with pytest.raises(SpecError, match="there is no such file") as caught:
        load_job(files.path.with_name("jbo.yaml"))
    assert caught.value.exit_code == 2
    assert "job.yaml?" in caught.value.problems[0].hint
    with pytest.raises(SpecError, match="orchestrator init"):
        load_job(files.path.parent / "nowhere" / "job.yaml")


def test_a_folder_is_no_job_spec(tmp_path: Path) -> None:
    """A folder raises SpecError that says it is one."""
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
        (b'name: "\\UFFFFFFFF"\n', None, "is not valid YAML"),
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
    """Text that is no job spec gives one problem, with its line if there is one.

    It is empty, no mapping, no YAML, not UTF-8, too deep or too large.
    """
    problem = files.problem(text)
    assert message in problem.message
    assert problem.line == line


def test_a_spec_error_survives_pickle(files: Files) -> None:
    """The error's problems are complete after pickling, as between processes."""
    with pytest.raises(SpecError) as caught:
        files.load(BAD)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)


def test_reading_a_job_imports_nothing_heavy() -> None:
    """Reading a job spec imports neither torch nor Ray nor other heavy libraries."""
    code = "import sys, orchestrator.job.yaml, orchestrator.job.space; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "ray", "transformers", "mlflow", "datasets", "numpy"} & set(modules)
