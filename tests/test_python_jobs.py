"""Jobs in Python: the same checks as for a job file, and data frames as data."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from small_jobs import job_document, write_job

import orchestrator as po
from orchestrator.cli.python.jobs import checked_job, plain_spec
from orchestrator.data.source_row import SourceRow
from orchestrator.data.tables import read_table
from orchestrator.job.spec import DataFiles, JobSpec
from orchestrator.job.yaml import load_job

FRAME = pd.DataFrame({"text": ["win a prize", "see you at noon", None], "label": [1, 0, 0]})


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def document(path: Any, **data: Any) -> dict[str, Any]:
    """Return a job on the data at ``path``."""
    settings = {"template": "{text}", "target": "label", "verbalizer": {0: " no", 1: " yes"}}
    return {
        "name": "frames",
        "base_model": {"id": "builtin:quickstart"},
        "data": {"path": path, **settings, **data},
    }


def rows_of(job: JobSpec, split: str = "train") -> list[SourceRow]:
    """Read the file of a split as a search does."""
    return read_table(Path(getattr(job.data.path, split)), split).rows


def kept_files() -> list[Path]:
    return sorted(Path(".orchestrator/data").glob("*"))


def test_importing_the_package_imports_nothing_heavy() -> None:
    """The names load when they are first used; a job needs neither torch nor Ray nor pandas."""
    heavy = ("torch", "ray", "mlflow", "pandas", "datasets", "transformers", "rich")
    code = (
        "import sys; before = set(sys.modules)\n"
        "import orchestrator as po\n"
        "print(sorted(name for name in set(sys.modules) - before if name.count('.') == 0))\n"
        "po.Job, po.load_job, po.BadInput\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert {"orchestrator"} == {*eval(first)} - set(sys.stdlib_module_names)
    assert second == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    """Each name can be imported, is listed for completion, and has a docstring and a home."""
    assert set(po.__all__) <= set(dir(po)) and set(po.__all__) == set(po._PLACES)
    for name in po.__all__:
        value = getattr(po, name)
        assert value.__doc__, name
        for own, member in vars(value).items() if isinstance(value, type) else ():
            if callable(member) and not own.startswith("_"):
                assert member.__doc__, f"{name}.{own}"
    absent = "no_such_name"
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        getattr(po, absent)


def test_a_job_is_the_same_from_a_file_a_mapping_and_keywords(tmp_path: Path) -> None:
    """All three give the same values and types, and the text of a job gives them again."""
    file = write_job(tmp_path)
    keywords = job_document(tmp_path)
    job = po.load_job(file)
    assert job == po.Job(keywords) == po.Job(**keywords)
    assert isinstance(job, po.Job) and isinstance(job, JobSpec)
    assert plain_spec(job) == load_job(file)
    Path("again.yaml").write_text(job.to_yaml())
    assert po.load_job("again.yaml") == job
    assert po.load_job(file, ["train.steps=8"]).train.steps == 8
    assert pickle.loads(pickle.dumps(job)) == copy.deepcopy(job) == job


def test_values_of_python_count_as_those_of_yaml(tmp_path: Path) -> None:
    """Tuples are lists, paths are texts, numbers of numpy are numbers, sections are mappings."""
    given = job_document(tmp_path)
    wanted = po.Job(given)
    given["search"]["space"]["num_virtual_tokens"] = (np.int64(2), 5)
    given["search"]["space"]["learning_rate"] = {"loguniform": (np.float64(0.01), 1.0)}
    given["data"]["path"] = {split: Path(file) for split, file in given["data"]["path"].items()}
    given["train"] = wanted.train
    assert po.Job(given) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": {1, 2}}}, "Job: data.path: is a set; write text, a number"),
        ({"trian": {}}, "Job: trian: unknown key (did you mean train?"),
        ({"train": {"steps": 2.5}}, "Job: train.steps: 2.5 is not allowed; allowed: a whole"),
        ({"name": "\ud800"}, "Job: name: holds half a character"),
        ({"base_model": None}, "Job: base_model: null is not allowed"),
        ({"data": {"path": "x", ("a",): 1}}, "a tuple can't be a key"),
    ],
)
def test_a_job_names_its_problems(changes: Mapping[str, Any], message: str) -> None:
    """Problems are those of a job file, and they come all at once."""
    with pytest.raises(po.SpecError) as found:
        po.Job({**document("builtin:quickstart"), **changes}, method="nothing")
    assert message in str(found.value)
    assert any(problem.where == "method" for problem in found.value.problems)


def test_a_value_that_holds_itself_is_refused() -> None:
    """A circle ends at the depth at which a file's would end."""
    circle: dict[str, Any] = {}
    circle["rename"] = circle
    with pytest.raises(po.SpecError, match="inside each other"):
        po.Job({**document("builtin:quickstart"), "data": circle})


def test_a_data_frame_is_written_once_with_its_types() -> None:
    """Rows come back as from a parquet file: numbers stay numbers, and a NaN is no value."""
    frame = FRAME.assign(score=[1.5, float("nan"), 2.0], day=pd.Timestamp("2026-01-02"))
    job = po.Job(document(frame))
    again = po.Job(document(frame.copy()))
    assert job == again and len(kept_files()) == 1
    assert isinstance(job.data.path, DataFiles)
    assert job.data.path.train == str(kept_files()[0].absolute())
    first, second, third = rows_of(job)
    assert first == {"text": "win a prize", "label": 1, "score": 1.5, "day": frame.day[0]}
    assert second["score"] is None and third["text"] is None and type(first["label"]) is int
    other = po.Job(document(frame.assign(label=0)))
    assert other.data.path != job.data.path and len(kept_files()) == 2


def test_what_was_made_an_index_is_still_a_column() -> None:
    """A named index is a column of the rows; the number of a row is not."""
    assert rows_of(po.Job(document(FRAME.set_index("label"))))[0]["label"] == 1
    assert set(rows_of(po.Job(document(FRAME)))[0]) == {"text", "label"}


def test_splits_may_come_from_different_places(tmp_path: Path) -> None:
    """A frame, a data set, an Arrow table and a file stand side by side."""
    file = tmp_path / "test.jsonl"
    file.write_text('{"text": "a", "label": 1}\n')
    validation = datasets.Dataset.from_dict({"text": ["b", "c", "d"], "label": [0, 1, 0]})
    job = po.Job(document({"train": FRAME, "validation": validation.select([2, 0]), "test": file}))
    assert [row["text"] for row in rows_of(job, "validation")] == ["d", "b"]
    assert rows_of(job, "test") == [{"text": "a", "label": 1}]
    arrow = pa.table({"text": ["e"], "label": [1]})
    assert rows_of(po.Job(document(arrow))) == [{"text": "e", "label": 1}]
    both = datasets.DatasetDict(train=validation, test=validation)
    assert rows_of(po.Job(document(both)), "test")[0]["text"] == "b"


@pytest.mark.parametrize(
    ("verbalizer", "label"), [({"ham": " no", "spam": " yes"}, "spam"), ({0: " no", 1: " yes"}, 1)]
)
def test_classes_of_a_data_set_have_names(verbalizer: dict[Any, str], label: Any) -> None:
    """A verbalizer may be written with a data set's names or with its numbers, as on the hub."""
    classes = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features({"text": datasets.Value("string"), "kind": classes})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "kind": [1, -1]}, features=features)
    job = po.Job(document(rows, rename={"kind": "label"}, verbalizer=verbalizer))
    first, second = rows_of(job)
    assert first["kind"] == label and second["kind"] in (None, -1)


def test_nothing_is_written_for_a_job_with_a_problem() -> None:
    """The spec is checked before a table is written; an unknown split is one of its problems."""
    for path, other in ((FRAME, {"steps": 0}), ({"dev": FRAME}, {})):
        with pytest.raises(po.SpecError):
            po.Job(document(path), train=other)
    assert not Path(".orchestrator").exists()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"text": ["a", 1]}), "data.path.train: the DataFrame can't be written"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "[Dd]uplicate column names"),
    ],
)
def test_what_parquet_cannot_hold_is_refused(frame: pd.DataFrame, message: str) -> None:
    """Mixed types and repeated columns are named, with what to do."""
    with pytest.raises(po.BadInput, match=message) as found:
        po.Job(document(frame))
    assert "astype" in found.value.hint


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """State goes below ORCHESTRATOR_HOME; a file of that name is no folder."""
    Path("home").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_HOME", "home")
    with pytest.raises(po.BadInput, match=r"the rows can't be kept in .*home") as found:
        po.Job(document(FRAME))
    assert "ORCHESTRATOR_HOME" in found.value.hint


def test_a_job_is_checked_as_on_the_command_line(tmp_path: Path) -> None:
    """Files have their lines in messages; other data takes the place of the job's own."""
    file = write_job(tmp_path)
    Path("train.jsonl").unlink()
    with pytest.raises(po.SpecError, match=r"job\.yaml:\d+: data\.path\.train: .* does not exist"):
        checked_job(file)
    with pytest.raises(po.BadInput, match=r"data\.path\.train: .* does not exist"):
        checked_job(po.load_job(file))
    with pytest.raises(po.BadInput, match="the job is a int"):
        checked_job(3)  # type: ignore[arg-type]
    rows = pd.DataFrame({"text": [f"text {i}" for i in range(40)], "label": [0, 1] * 20})
    spec, inputs = checked_job(file, rows)
    assert type(spec) is JobSpec and spec.name == "tiny"
    assert inputs.rows is not None and sum(inputs.rows.counts.values()) == 40
    assert checked_job(file, "builtin:quickstart")[0].data.path == "builtin:quickstart"
    with pytest.raises(po.SpecError, match="held_out"):
        checked_job(po.load_job(file, ["data.held_out=random"]), {"train": rows, **two(rows)})


def two(rows: pd.DataFrame) -> dict[str, Any]:
    return {"validation": rows, "test": rows}
