"""Files and folders of a job are checked at once, with lines, before Ray or torch load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import model_folder
from small_jobs import Command, small_job, write_job

from orchestrator.job.yaml import load_job
from orchestrator.search.inputs import examine

SOON_S = 15.0  # limit for a busy machine; an idle one needs less than 3

HEAVY = ("torch", "ray", "transformers", "mlflow")


def problems(command: Command, job: Path, *words: str) -> list[tuple[str, int | None, str]]:
    """Return the key, line and message of each problem that ``validate`` reports."""
    said = command("validate", job, "--json", *words)
    if said.code == 0:
        return []
    assert said.code == 2
    return [
        (found["where"], found["line"], found["message"])
        for found in said.document["error"]["problems"]
    ]


def line_of(job: Path, text: str) -> int:
    lines = job.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def own_model(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def test_a_sound_job_is_said_to_be_sound(command: Command, tmp_path: Path) -> None:
    """With local files and a local model nothing is left unchecked."""
    said = command("validate", write_job(tmp_path))
    assert said.code == 0 and "sound" in said.out and "not checked" not in said.out


def test_all_problems_are_reported_at_once_with_their_lines(
    command: Command, tmp_path: Path
) -> None:
    """A missing model, file, column and prompt are reported as four problems."""
    job = write_job(tmp_path, base_model__id="./no-model", data__target="lable")
    text = job.read_text(encoding="utf-8").replace("test.jsonl", "gone.jsonl")
    job.write_text(text.replace("- random", "- {artifact: ./no-prompt}"), encoding="utf-8")
    found = problems(command, job)
    assert [(key, line) for key, line, _ in found] == [
        ("base_model.id", line_of(job, "./no-model")),
        ("data.path.test", line_of(job, "gone.jsonl")),
        ("data.target", line_of(job, "lable")),
        ("search.space.init[0].artifact", line_of(job, "./no-prompt")),
    ]


def test_a_value_from_the_command_line_has_no_line(command: Command, tmp_path: Path) -> None:
    """The problem names the override instead of a line."""
    said = command("validate", write_job(tmp_path), "--set", "data.path.test=gone.csv")
    assert said.code == 2 and said.err.startswith(
        "--set data.path.test=gone.csv: data.path.test: the file gone.csv"
    )


def test_spec_only_looks_at_no_file(command: Command, tmp_path: Path) -> None:
    """--spec-only checks the spec alone, and the answer says so."""
    job = write_job(tmp_path, base_model__id="./no-model", data__path={"train": "gone.jsonl"})
    said = command("validate", job, "--spec-only")
    assert said.code == 0 and "not checked: files and folders" in said.out
    assert command("validate", job, "--spec-only", "--set", "train.steps=0").code == 2


@pytest.mark.parametrize(
    ("override", "key", "reason"),
    [
        ("base_model.id=nobody/no-such-model", "base_model.id", "hub"),
        ("base_model.id=builtin:quickstart", "base_model.id", "made on the spot"),
        ("data.path=nobody/no-such-data", "data.path", "hub"),
        ("data.path=builtin:quickstart", "data.path", "made on the spot"),
        ("search.space.init={artifact: spam@champion}", "search.space.init.artifact", "registry"),
    ],
)
def test_what_is_not_here_is_said_to_be_unchecked(
    command: Command, tmp_path: Path, override: str, key: str, reason: str
) -> None:
    """Nothing is downloaded, created or contacted; text and JSON list what was not checked."""
    job = write_job(tmp_path)
    said = command("validate", job, "--set", override)
    assert said.code == 0 and f"not checked: {key}: " in said.out
    (unchecked,) = command("validate", job, "--set", override, "--json").document["not_checked"]
    assert unchecked["key"] == key and reason in unchecked["reason"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("base_model.id=builtin:quikstart", "base_model.id"),
        ("data.path=builtin:quikstart", "data.path"),
        ("data.path=./train.jsonl", "data.path"),
    ],
)
def test_a_name_that_can_not_be_right_is_a_problem(
    command: Command, tmp_path: Path, override: str, key: str
) -> None:
    """Unknown built-in models and data, and paths in the wrong place, are problems at once."""
    assert [found[0] for found in problems(command, write_job(tmp_path), "--set", override)] == [
        key
    ]


# Rows


@pytest.mark.parametrize(
    ("changes", "key", "named"),
    [
        ({"data__template": "{body}?"}, "data.template", "'body'"),
        ({"data__target": "lable"}, "data.target", "'lable'"),
        ({"data__where": {"lang": "en"}}, "data.where", "'lang'"),
        ({"data__where": {"label": 7}}, "data.where", "7"),
        ({"data__verbalizer": {0: " no"}}, "data.verbalizer", "label 1"),
        (
            {
                "data__prefix_lm": "body", "data__template": "{prefix}",
                "data__target": "continuation",
                "data__verbalizer": None, "search__space__init": "random",
            },
            "data.prefix_lm", "'body'",
        ),
        (
            {
                "data__references": "all", "data__target": "answer", "data__verbalizer": None,
                "search__metric": "bleu", "search__space__init": "random",
            },
            "data.references", "'all'",
        ),
        (
            {
                "method": "prompt_design",
                "search": {"space": {"template": ["{text}?", "{body}?"]}},
                "train": {},
            },
            "search.space.template", "'body'",
        ),
        (
            {"data__rename": {"text": "body"}, "data__template": "{body} {txt}"},
            "data.template", "'txt'",
        ),
    ],
)  # fmt: skip
def test_columns_and_labels_are_checked(
    command: Command, tmp_path: Path, changes: dict[str, Any], key: str, named: str
) -> None:
    """The problem is at the key that names the column, and names the column or label."""
    (problem,) = problems(command, write_job(tmp_path, **changes))
    assert problem[0] == key and named in problem[2]


def test_a_label_of_any_split_and_row_counts(command: Command, tmp_path: Path) -> None:
    """A label that only the last row of the test file has is still found."""
    job = write_job(tmp_path)
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "odd", "label": 9}) + "\n")
    (problem,) = problems(command, job)
    assert problem[0] == "data.verbalizer" and "label 9" in problem[2]


def test_labels_are_checked_where_another_file_is_missing(command: Command, tmp_path: Path) -> None:
    """A missing file does not hide the problems of the other files."""
    job = write_job(tmp_path, data__verbalizer={0: " no"})
    (tmp_path / "validation.jsonl").unlink()
    assert {found[0] for found in problems(command, job)} == {
        "data.path.validation",
        "data.verbalizer",
    }


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("train.txt", "text\n", "format"),
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": ', "can't be read"),
        ("train.parquet", "PAR1 and no more", "can't be read"),
    ],
)
def test_a_file_in_no_known_format_is_a_problem(
    command: Command, tmp_path: Path, name: str, content: str, named: str
) -> None:
    """The problem is at the file's key and says what is wrong."""
    job = write_job(tmp_path)
    file = tmp_path / "other" / name
    file.parent.mkdir()
    file.write_text(content)
    found = problems(command, job, "--set", f"data.path.train={file}")
    assert [key for key, _, _ in found] == ["data.path.train"]
    assert str(file) in found[0][2]


def test_a_fraction_of_a_split_that_the_data_has_is_a_problem(
    command: Command, tmp_path: Path
) -> None:
    """With ``data.where`` this needs the rows: the spec alone can't tell if a split has any."""
    job = write_job(tmp_path, data__where={"kind": "a"}, data__test_fraction=0.3)
    write_kind(tmp_path, train="a", validation="a", test="a")
    assert [found[0] for found in problems(command, job)] == ["data.test_fraction"]
    write_kind(tmp_path, test="b")
    assert problems(command, job) == []


def write_kind(folder: Path, **kinds: str) -> None:
    """Add a column ``kind`` to all rows of a split's file."""
    for split, kind in kinds.items():
        file = folder / f"{split}.jsonl"
        rows = [{**json.loads(line), "kind": kind} for line in file.read_text().splitlines()]
        file.write_text("\n".join(json.dumps(row) for row in rows))


# The base model


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: _overwrite(folder / name, content)


def _overwrite(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)  # may be a link to the shared model's file
    file.write_bytes(content)


def _cut(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        _overwrite(file, file.read_bytes()[:-4])


def _without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_remove("config.json"), "holds no config.json"),
    "a config that is no JSON": (_write("config.json", b"{"), "is not JSON"),
    "a config that is a list": (_write("config.json", b"[]"), "not a JSON object"),
    "a classifier": (
        _write(
            "config.json",
            b'{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}',
        ),
        "not a language model",
    ),
    "no tokenizer": (_without_tokenizer, "holds no tokenizer"),
    "a tokenizer that is no JSON": (_write("tokenizer.json", b"<html>"), "is not JSON"),
    "an empty tokenizer file": (_write("tokenizer.json", b""), "is empty"),
    "no weights": (_remove("model.safetensors"), "safetensors"),
    "weights cut short": (_cut, "header says"),
    "weights that are a pointer": (
        _write("model.safetensors", b"version https://git-lfs"),
        "no header",
    ),
    "empty weights": (_write("model.safetensors", b""), "no header"),
    "a missing shard": (
        _write("model.safetensors.index.json", b'{"weight_map": {"a": "model-00002.safetensors"}}'),
        "model-00002.safetensors",
    ),
    "an index without a map": (_write("model.safetensors.index.json", b"[]"), "weight_map"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_model_folder_is_a_problem(
    command: Command, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    """Configuration, tokenizer and weights must be there and complete."""
    folder = own_model(tmp_path)
    damage(folder)
    (problem,) = problems(command, write_job(tmp_path, base_model__id=str(folder)))
    assert problem[0] == "base_model.id" and named in problem[2]


def test_an_adapter_in_place_of_a_model_names_its_base_model(
    command: Command, tmp_path: Path
) -> None:
    """The error suggests the adapter's base model, which was probably meant."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    said = command("validate", write_job(tmp_path, base_model__id=str(folder)))
    assert said.code == 2 and "set base_model.id to owner/base" in said.err


def test_a_folder_of_models_lists_them(command: Command, tmp_path: Path) -> None:
    """A folder one level too high is refused with a list of the models in it."""
    own_model(tmp_path)
    said = command("validate", write_job(tmp_path, base_model__id=f"{tmp_path}/"))
    assert said.code == 2 and "name one of the models in it: model" in said.err


def test_a_revision_of_a_folder_with_a_hubs_name_has_no_effect(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only this check sees that the name is a local folder, where a revision has no effect."""
    own_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path, base_model__id="model", base_model__revision="v2")
    assert [found[0] for found in problems(command, job)] == ["base_model.revision"]


# Before anything is spent


def imported_by(words: list[str], folder: Path) -> tuple[int, set[str], str, float]:
    """Run a command; return its exit code, heavy imports, standard error and seconds."""
    program = (
        "import sys, json\n"
        f"sys.argv = ['orchestrator', *{words!r}]\n"
        "from orchestrator.cli import run_verb\n"
        "code = run_verb()\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
        "sys.exit(code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, set(json.loads(done.stdout)), done.stderr, time.monotonic() - started


@pytest.mark.parametrize(
    "verb", [["run", "-q"], ["plan", "-q"], ["submit", "--dry-run"]], ids=lambda verb: verb[0]
)
def test_a_fault_in_a_file_is_refused_before_anything_heavy_is_imported(
    tmp_path: Path, verb: list[str]
) -> None:
    """Neither torch nor Ray nor MLflow is loaded, so nothing is started or left behind."""
    job = write_job(tmp_path, data__target="lable")
    code, heavy, said, seconds = imported_by([verb[0], str(job), *verb[1:]], tmp_path)
    assert code == 2 and heavy == set()
    assert f"{job}:{line_of(job, 'lable')}: data.target: " in said
    assert seconds < SOON_S


def test_a_submitted_jobs_whole_path_may_be_the_clusters(command: Command, tmp_path: Path) -> None:
    """Paths that only the cluster has are not checked; local ones are."""
    job = write_job(tmp_path, base_model__id="/only/on/the/cluster")
    said = command("submit", job, "--dry-run", "--image-has-code", "--json")
    assert said.code == 0 and said.document["on_the_cluster"] == ["/only/on/the/cluster"]
    refused = command("submit", job, "--dry-run", "--image-has-code", "--set", "data.target=lable")
    assert refused.code == 2 and "data.target" in refused.err


def test_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparation uses the rows that the check has read: the files may be gone by then."""
    from orchestrator.search.prepare import prepare

    job = small_job(tmp_path)
    inputs = examine(job)
    assert inputs.rows is not None and inputs.faults == ()
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert prepare(job, rows=inputs.rows).rows == inputs.rows


def test_a_saved_search_is_sound(tmp_path: Path) -> None:
    """A job written out with all its values passes the check like the original."""
    import yaml

    job = small_job(tmp_path)
    file = tmp_path / "saved.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True)), encoding="utf-8")
    assert examine(load_job(file)).faults == ()
