"""Rows cut to the used columns: missing cells, labels, and the position of errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_tokenizer

from orchestrator.data.dataset import load_rows, load_split
from orchestrator.data.encoding import make_encoder
from orchestrator.data.source_row import SourceRow
from orchestrator.data.used_columns import UsedColumns
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec

MISSING = [None, float("nan"), pd.NA, pd.NaT, "", "  ", "\n"]


def spec(path: Any = "x", **changes: Any) -> DataSpec:
    given = {"path": path, "template": "{text}?", "target": "label", **changes}
    return DataSpec.model_validate(given)


def columns(*inputs: str, **changes: Any) -> UsedColumns:
    return UsedColumns(spec(**changes), inputs or ("text",))


def rows(*cells: dict[str, Any], source: str = "train.csv") -> list[SourceRow]:
    """Return rows as a reader makes them, below one header line."""
    return [
        SourceRow(row, source=source, number=n, line=n + 1) for n, row in enumerate(cells, start=1)
    ]


def write(file: Path, *cells: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in cells), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("cell", MISSING)
@pytest.mark.parametrize("column", ["text", "topic"])
def test_an_empty_input_is_refused_with_its_place(cell: Any, column: str) -> None:
    """The message has the file, line, row and column of the empty input.

    This holds for any column of the template and any kind of missing value.
    """
    whole = {"text": "a", "topic": "b", "label": 0}
    with pytest.raises(
        BadInput, match=rf"train\.csv:3 \(row 2\) has no text in column '{column}'.*\n.*data\.empty"
    ):
        columns("text", "topic").cut(rows(whole, {**whole, column: cell}), "train")


def test_an_absent_cell_is_an_empty_input_and_an_unknown_column_a_mistake_in_the_spec() -> None:
    """A column that some rows have is missing in the others.

    A column that no row has is misspelt.
    """
    with pytest.raises(
        BadInput,
        match=r"train\.csv:2 \(row 1\) has no text in column 'text'.*2 more rows have none",
    ):
        columns().cut(
            rows({"label": 0}, {"text": "a", "label": 0}, {"label": 0}, {"label": 1}), "train"
        )
    for empty in ("refuse", "drop", "keep"):
        with pytest.raises(
            BadInput,
            match=r"data\.template names column 'text', which train\.csv:2 \(row 1\) lacks",
        ):
            columns(empty=empty).cut(rows({"txt": "a", "label": 0}), "train")


def test_a_renamed_column_may_be_absent_too() -> None:
    """A row that lacks the old name of a renamed column has a missing cell."""
    used = columns(rename={"sentence": "text"}, empty="keep")
    found = used.cut(rows({"label": 0}, {"sentence": "a", "label": 1}), "train")
    assert found == [{"text": None, "label": 0}, {"text": "a", "label": 1}]


def test_empty_rows_are_dropped_and_counted_or_kept_as_empty_texts() -> None:
    """``drop`` keeps the order and line numbers of the other rows; ``keep`` keeps all rows."""
    given = rows(
        {"text": "a", "label": 0},
        {"text": None, "label": 1},
        {"label": 0},
        {"text": "d", "label": 1},
    )
    used = columns(empty="drop")
    found = used.cut(given, "train")
    assert [(row["text"], row.line) for row in found] == [("a", 2), ("d", 5)]  # type: ignore[attr-defined]
    assert used.dropped == {"train": 2}
    kept = columns(empty="keep")
    assert [row["text"] for row in kept.cut(given, "train")] == [
        "a",
        None,
        None,
        "d",
    ] and kept.dropped == {}


def test_dropped_rows_are_told_and_dropping_all_of_them_is_refused(tmp_path: Path) -> None:
    """The note has the split and both counts; a split may not lose all of its rows."""
    full = [{"text": f"row {n}", "label": n % 2} for n in range(20)]
    path = {"train": write(tmp_path / "a.jsonl", *full, {"label": 1}, {"text": " ", "label": 0}),
            "validation": write(tmp_path / "b.jsonl", *full)}  # fmt: skip
    found = load_rows(spec(path, empty="drop"))
    assert found.notes == ("data.empty: drop left out 2 of 22 rows of train, which have no input",)
    assert sum(found.counts.values()) == 40
    assert load_rows(spec({"train": path["validation"]}, empty="drop")).notes == ()
    path["validation"] = write(tmp_path / "c.jsonl", *[{**row, "text": ""} for row in full])
    with pytest.raises(BadInput, match="drop leaves no row of validation: 20 of 20 have no input"):
        load_rows(spec(path, empty="drop"))


@pytest.mark.parametrize("target", [None, float("nan"), pd.NA, [], [None], "", " "])
def test_a_missing_target_is_refused_with_its_place(target: Any) -> None:
    """Null and an empty list of texts are no targets, whatever ``data.empty`` is."""
    match = r"train\.csv:2 \(row 1\) has no value in the target column 'label'"
    with pytest.raises(BadInput, match=match):
        columns(empty="drop").cut(rows({"text": "a", "label": target}), "train")
    if not isinstance(target, str):
        with pytest.raises(BadInput, match=match):
            columns(empty="keep").cut(rows({"text": "a", "label": target}), "train")


def test_an_empty_target_may_be_a_label_or_kept() -> None:
    """A verbalizer may name the empty text; with ``keep`` the empty text may be generated."""
    row = {"text": "a", "label": ""}
    assert columns(verbalizer={"": " none", "x": " x"}).cut(rows(row), "train") == [row]
    assert columns(empty="keep").cut(rows(row), "train") == [row]


@pytest.mark.parametrize("cell", [b"bytes", float("inf"), ["a", float("nan")], "\ud800"])
def test_a_cell_without_a_text_is_refused_with_its_place(cell: Any) -> None:
    with pytest.raises(BadInput, match=r"train\.csv:2 \(row 1\), column 'text': a cell holds"):
        columns().cut(rows({"text": cell, "label": 0}), "train")


def test_rows_without_a_place_are_counted() -> None:
    """Rows of the hub and of built-in data are named by their number."""
    with pytest.raises(BadInput, match=r"row 2 of train has no text in column 'text'"):
        columns().cut([{"text": "a", "label": 0}, {"text": "", "label": 0}], "train")


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=6), st.data())
def test_labels_are_the_same_from_every_format(labels: list[int], data: st.DataObject) -> None:
    """Integers, decimals and texts all become the verbalizer's keys, in the keys' type."""
    cells = [
        data.draw(st.sampled_from([label, float(label), str(label), f"{label}.0"]))
        for label in labels
    ]
    given = rows(*({"text": "a", "label": cell} for cell in cells))
    for keys in ((0, 1), ("0", "1"), (0.0, 1.0)):
        found = columns(verbalizer={keys[0]: " no", keys[1]: " yes"}).cut(given, "train")
        assert [row["label"] for row in found] == [keys[label] for label in labels]
        assert all(type(row["label"]) is type(keys[0]) for row in found)


def test_lists_as_labels_have_a_place() -> None:
    with pytest.raises(
        BadInput, match=r"train\.csv:2 \(row 1\): the target column holds lists or objects"
    ):
        columns(verbalizer={0: " no"}).cut(rows({"text": "a", "label": [0, 1]}), "train")


def test_splits_in_different_formats_work_together(tmp_path: Path) -> None:
    """Integer labels in one file, texts in another and decimals in a third are equivalent.

    Labels, token ids and fingerprint are those of a single format.
    """

    def loaded(name: str, *kinds: Any) -> Any:
        files = {}
        for split, kind in zip(("train", "validation", "test"), kinds, strict=True):
            cells = [{"text": f"{split} {n}", "label": kind(n % 2)} for n in range(6)]
            files[split] = write(tmp_path / f"{name}-{split}.jsonl", *cells)
        return load_rows(spec(files, verbalizer={0: " no", 1: " yes"}))

    alike, mixed = loaded("alike", int, int, int), loaded("mixed", int, str, float)
    assert mixed == alike and mixed.fingerprint == alike.fingerprint
    encoder = make_encoder(spec(verbalizer={0: " no", 1: " yes"}), mixed, tiny_tokenizer())
    assert encoder.encode(mixed.test, "label").labels == [0, 1] * 3


@pytest.mark.parametrize(
    ("wanted", "cells"),
    [
        (1, [1, "1", 1.0]),
        ("1", [1, "1", 1.0]),
        (True, [True, "true", "True"]),
        (1.5, [1.5, "1.5"]),
        ("007", ["007"]),
    ],
)
def test_where_matches_by_meaning(tmp_path: Path, wanted: Any, cells: list[Any]) -> None:
    """Every spelling of the value matches, and no other value, list or missing cell does."""
    others = ["7", 7, 0, False, "x", None, [1], {"a": 1}, "01"]
    table = [{"text": "a", "label": "x", "kind": kind} for kind in [*cells, *others]]
    path = write(
        tmp_path / "a.jsonl", *({**row, "text": f"row {n}"} for n, row in enumerate(table))
    )
    found = load_split(spec({"train": path}, where={"kind": wanted}), "train")
    assert [row["text"] for row in found] == [f"row {n}" for n in range(len(cells))]
