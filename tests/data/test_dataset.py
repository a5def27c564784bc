"""Rows from files, the hub and the quickstart, and the errors reported before training starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.data.dataset import RowSplits, load_rows, load_split, read_file, set_aside
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec

ROWS = [
    {"text": f"row {number}, “quoted”\tand {{braced}}", "label": number % 2} for number in range(20)
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif file.suffix in (".csv", ".tsv"):
        delimiter, quoting = (",", "needed") if file.suffix == ".csv" else ("\t", "all_valid")
        pyarrow.csv.write_csv(
            table, file, pyarrow.csv.WriteOptions(delimiter=delimiter, quoting_style=quoting)
        )
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def data(path: Any, **changes: Any) -> DataSpec:
    given = {"path": path, "template": "{text}?", "target": "label", **changes}
    return DataSpec.model_validate(given)


def files(**paths: Path) -> dict[str, str]:
    return {split: str(path) for split, path in paths.items()}


def as_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: str(cell) for name, cell in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """Values are the same from each format, Unicode, quotes and tabs included.

    In CSV and TSV all values are texts.
    """
    expected = as_texts(ROWS) if suffix in ("csv", "tsv") else ROWS
    assert read_file(write(tmp_path / f"train.{suffix}", ROWS), "data.path.train") == expected


def test_given_splits_are_kept_and_cut_to_the_used_columns(tmp_path: Path) -> None:
    """Files of different formats can be combined; unused columns are dropped."""
    rows = [{**row, "unused": 1} for row in ROWS]
    path = files(
        train=write(tmp_path / "a.jsonl", rows[:9]),
        validation=write(tmp_path / "b.csv", rows[9:14]),
        test=write(tmp_path / "c.parquet", rows[14:]),
    )
    found = load_rows(data(path))
    assert found == RowSplits(ROWS[:9], as_texts(ROWS[9:14]), ROWS[14:])
    assert found.counts == {"train": 9, "validation": 5, "test": 6} and found["test"] == ROWS[14:]


def test_the_fingerprint_is_of_the_rows_as_used(tmp_path: Path) -> None:
    """The fingerprint depends on the values and order of the rows, not on the file format."""

    def fingerprint(name: str, rows: list[dict[str, Any]]) -> str:
        path = write(tmp_path / name, rows)
        return load_rows(data(files(train=path, validation=path, test=path))).fingerprint

    rows = as_texts(ROWS)
    first = fingerprint("a.jsonl", rows)
    assert (
        fingerprint("b.parquet", rows)
        == fingerprint("c.csv", [{**row, "more": 1} for row in rows])
        == first
    )
    changed = [{**rows[0], "label": "1"}, *rows[1:]]
    assert len({first, fingerprint("d.jsonl", changed), fingerprint("e.jsonl", rows[::-1])}) == 3


def test_missing_splits_are_set_aside(tmp_path: Path) -> None:
    """Without validation and test files, each is a part of train.

    Together the three splits are the rows given.
    """
    path = write(tmp_path / "train.jsonl", ROWS)
    found = load_rows(data(files(train=path), validation_fraction=0.2, test_fraction=0.1))
    assert found.counts == {"train": 14, "validation": 4, "test": 2}
    rows = [*found.train, *found.validation, *found.test]
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in ROWS)
    assert load_rows(data(files(train=path), validation_fraction=0.2)) == found
    assert load_rows(data(files(train=path), validation_fraction=0.2, split_seed=1)) != found


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=30), st.floats(0.01, 0.49), st.integers(0, 99)
)
@example([0] + [1] * 9, 0.49, 0)
@example([0] + [1] * 9, 0.49, 1)
@example([0] + [1] * 9, 0.49, 2)
@settings(deadline=None)
def test_rows_with_the_same_input_stay_together(
    inputs: list[int], fraction: float, seed: int
) -> None:
    """No input is on both sides, no row is lost, and the order stays.

    With two or more different inputs neither side is empty.
    """
    rows = [{"text": str(text), "label": number} for number, text in enumerate(inputs)]
    kept, aside = set_aside(rows, fraction, data("x", split_seed=seed))
    assert not {row["text"] for row in kept} & {row["text"] for row in aside}
    assert sorted(row["label"] for row in [*kept, *aside]) == list(range(len(rows)))
    for side in (kept, aside):
        assert [row["label"] for row in side] == sorted(row["label"] for row in side)
    assert kept and bool(aside) == (len(set(inputs)) > 1)
    assert set_aside(rows, fraction, data("x", split_seed=seed)) == (kept, aside)
    if len(set(inputs)) == len(inputs):
        assert len(aside) == max(1, round(fraction * len(rows)))


def test_limits_keep_a_seeded_choice_in_order(tmp_path: Path) -> None:
    """A limit keeps the same rows every time, in the order of the file.

    A limit larger than the split keeps all of its rows.
    """
    path = write(tmp_path / "a.jsonl", ROWS)
    limits = {"train": 5, "validation": 100}
    found = load_rows(data(files(train=path, validation=path, test=path), limit=limits))
    assert found.counts == {"train": 5, "validation": 20, "test": 20}
    places = [ROWS.index(row) for row in found.train]  # type: ignore[arg-type]
    assert places == sorted(places) and len(set(places)) == 5 and places != list(range(5))
    assert load_rows(data(files(train=path, validation=path, test=path), limit=limits)) == found


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    """A renamed column is found under its new name; renaming an absent column does nothing."""
    path = write(
        tmp_path / "a.jsonl", [{"sentence": row["text"], "y": row["label"]} for row in ROWS]
    )
    spec = data(files(train=path), rename={"sentence": "text", "y": "label", "absent": "z"})
    assert Counter(row["label"] for row in load_rows(spec).train).keys() == {0, 1}


def refused(spec: DataSpec, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_rows(spec)


def test_a_missing_file(tmp_path: Path) -> None:
    """The message names the key, the file and the folder that was searched."""
    refused(
        data(files(train=tmp_path / "no.jsonl")),
        r"data\.path\.train: the file .*no\.jsonl does not exist \(looked in",
    )
    refused(data(files(train=tmp_path)), r"does not exist")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    """The message lists the known suffixes."""
    (tmp_path / "a.xlsx").write_text("x")
    refused(
        data(files(train=tmp_path / "a.xlsx")),
        r"can't tell the format of .*a\.xlsx(.|\n)*\.jsonl, \.json, \.csv",
    )


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.parquet", "header.csv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    """The message says that a split is empty, for train as for test, whatever the format."""
    file, full = tmp_path / name, write(tmp_path / "full.jsonl", ROWS)
    file.write_text("text,label\n" if name.startswith("header") else "")
    refused(data(files(train=file)), "the train split is empty")
    refused(data(files(train=full, test=file)), "the test split is empty")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text": "a"\n{'), ("a.parquet", "PAR1 no"), ("a.json", "[[[")]
)
def test_a_damaged_file(tmp_path: Path, name: str, text: str) -> None:
    """The message has the file, the reader's reason, and the line if the format has lines."""
    (tmp_path / name).write_text(text)
    refused(
        data(files(train=tmp_path / name)),
        rf"data\.path\.train: .*{name}(:\d)? can't be read as .*: .+",
    )


def test_a_missing_column(tmp_path: Path) -> None:
    """The message has the key that names the column, the row, its line and its columns."""
    path = files(train=write(tmp_path / "a.jsonl", [{"sentence": "a", "label": 0}] * 3))
    refused(
        data(path),
        r"data\.template names column 'text', which .*a\.jsonl:1 \(row 1\) lacks; "
        r"it has \['label', 'sentence'\]",
    )
    refused(data(path, template="{sentence}", target="y"), r"data\.target names column 'y'")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_row_without_a_target(tmp_path: Path, suffix: str) -> None:
    """An empty target is refused and its row is named, whatever the format."""
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": None}]
    path = write(tmp_path / f"a.{suffix}", rows)
    refused(data(files(train=path)), r"row 3\b.* has no value in the target column 'label'")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_references_are_lists_of_texts_or_nothing(tmp_path: Path, suffix: str) -> None:
    """The column is kept unchanged, None and empty lists included.

    The fingerprint depends on the column.
    """
    lists = [["a", "b"], [], None, ["ä"]]
    rows = [{"text": f"row {n}", "label": "x", "right": lists[n % 4]} for n in range(8)]
    path = write(tmp_path / f"a.{suffix}", rows)
    spec = data(files(train=path, validation=path, test=path), references="right")
    found = load_rows(spec)
    assert [row["right"] for row in found.test] == lists * 2
    plain = load_rows(spec.model_copy(update={"references": None}))
    assert "right" not in plain.test[0] and plain.fingerprint != found.fingerprint


@pytest.mark.parametrize(("cell", "shown"), [("a", "'a'"), ([1], r"'\[1\]'"), ({"a": "b"}, r"\{")])
def test_references_that_are_no_list_of_texts(tmp_path: Path, cell: Any, shown: str) -> None:
    """The message has the row, the value and the key; an absent column is reported too."""
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "x", "right": cell}] * 4)
    spec = data(files(train=path, validation=path, test=path), references="right")
    refused(
        spec,
        rf"a\.jsonl:1 \(row 1\) has .*{shown}.* in column 'right', "
        rf"which data\.references names; a list of texts",
    )
    refused(
        spec.model_copy(update={"references": "rihgt"}),
        r"data\.references names column 'rihgt', which .*row 1",
    )


def test_only_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    """``where`` selects rows by columns that nothing else uses.

    A split without any such row is set aside from train.
    """
    rows = [{**row, "kind": "ab"[number % 2], "label": number} for number, row in enumerate(ROWS)]
    path = files(
        train=write(tmp_path / "a.jsonl", rows[:12]),
        validation=write(tmp_path / "b.jsonl", rows[12:]),
        test=write(tmp_path / "c.jsonl", [row for row in rows if row["kind"] == "b"]),
    )
    found = load_rows(data(path, where={"kind": "a"}))
    assert [row["label"] for row in found.validation] == [12, 14, 16, 18]
    assert sorted(row["label"] for row in [*found.train, *found.test]) == [0, 2, 4, 6, 8, 10]
    assert load_split(data(path, where={"kind": "b", "label": 3}), "train") == [
        {"text": ROWS[3]["text"], "label": 3}
    ]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"knid": "a"},
            r"data\.where names column 'knid', which no row has; rows have \['label', 'text'\]",
        ),
        ({"text": "nowhere"}, r"no row matches data\.where: \{'text': 'nowhere'\}"),
    ],
)
def test_rows_that_nobody_has(tmp_path: Path, where: dict[str, str], message: str) -> None:
    """A misspelt column and a value that no row has get different messages."""
    refused(data(files(train=write(tmp_path / "a.jsonl", ROWS)), where=where), message)


def test_built_in_data(tmp_path: Path) -> None:
    """The built-in tasks load by name, and the error for a wrong name lists them."""
    found = load_rows(data("builtin:reviews-topic"))
    assert {row["label"] for row in found.test} == {"food", "hotel", "film", "book"}
    assert len(load_rows(data("builtin:reviews-topic", where={"source": "film"})).test) in range(
        60, 140
    )
    refused(
        data("builtin:reviews"),
        "'builtin:reviews' is unknown; built-in data sets are builtin:quickstart, builtin:rev",
    )


def test_a_path_where_files_are_named_by_split(tmp_path: Path) -> None:
    """A path in data.path is not taken for a hub name; the message shows how to write it."""
    file = write(tmp_path / "a.jsonl", ROWS)
    refused(data(str(file)), r"is a path; files are named by split(.|\n)*--set data\.path\.train=")
    refused(data("./nowhere/a.jsonl"), "is a path")


def test_a_hub_name_without_a_network() -> None:
    """Offline, a hub data set raises Unreachable with the next steps.

    The library's traceback is not shown.
    """
    code = """
import orchestrator
from orchestrator.data.dataset import load_rows
from orchestrator.errors import Unreachable
from orchestrator.job.spec import DataSpec
try:
    load_rows(DataSpec(path="nobody/nothing-of-that-name", template="{text}", target="label"))
except Unreachable as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "data.path 'nobody/nothing-of-that-name' is not in the local cache" in said.stdout
    assert "HF_HUB_OFFLINE is set" in said.stdout and "next: connect to the network" in said.stdout


class FakeSplit(list[dict[str, Any]]):
    """Rows of a hub data set that also have the features of its columns."""

    @property
    def features(self) -> dict[str, Any]:
        return {"label": SimpleNamespace(names=["ham", "spam"]), "text": object()}


@pytest.mark.parametrize(
    ("verbalizer", "label"),
    [({"ham": " h", "spam": " s"}, "spam"), ({0: " h", 1: " s"}, 1), (None, 1)],
)
def test_class_numbers_of_the_hub_become_names_where_the_verbalizer_has_names(
    monkeypatch: pytest.MonkeyPatch, verbalizer: dict[Any, str] | None, label: Any
) -> None:
    """A verbalizer keyed by name gets names, one keyed by number gets numbers.

    Splits with other names than train, validation and test are left out.
    """
    import datasets

    loaded = {
        split: FakeSplit([{"text": "a", "label": 1}])
        for split in ("train", "validation", "test", "extra")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    found = load_rows(data("owner/name", verbalizer=verbalizer))
    assert found.counts == {"train": 1, "validation": 1, "test": 1}
    assert found.train == [{"text": "a", "label": label}]


def test_no_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a hub data set without train names the usable splits that it has."""
    import datasets

    loaded = {split: FakeSplit([{"text": "a", "label": 1}]) for split in ("test", "unsupervised")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    refused(data("owner/name"), r"no train split, only \['test'\]")
