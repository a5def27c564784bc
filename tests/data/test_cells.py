"""Conversion of cells to text, whatever library the cells come from."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.data.cells import cell_text, early_cell_text, is_blank, is_missing
from orchestrator.errors import BadInput

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_a_json_value_is_its_json_text_and_a_text_is_itself(value: Any) -> None:
    """Parsing the text gives the value back, so nothing is lost or invented."""
    text = cell_text(value)
    if isinstance(value, str):
        assert text == value
    elif value is None:
        assert text == ""
    else:
        assert json.loads(text) == value


@given(st.lists(numbers | st.text(max_size=5) | st.booleans(), max_size=4))
@example([1, 0.5, True])
def test_numpy_arrow_and_pandas_give_the_text_of_what_they_hold(values: list[Any]) -> None:
    """A value has the same text alone, in an array, in a data frame and in an Arrow table."""
    expected = [cell_text(value) for value in values]
    assert [cell_text(value) for value in np.array(values, dtype=object)] == expected
    frame = pd.DataFrame({"cell": pd.Series(values, dtype=object)})
    assert [cell_text(row["cell"]) for row in frame.to_dict("records")] == expected
    for value, text in zip(values, expected, strict=True):
        if not isinstance(value, int) or abs(value) < 2**63:
            assert cell_text(pa.scalar(value)) == text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (True, "true"),
        (np.False_, "false"),
        (1.0, "1.0"),
        (np.int8(3), "3"),
        (np.float32(0.5), "0.5"),
        (10**30, "1" + "0" * 30),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("1E+3"), "1000"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2), "2024-01-02T00:00:00"),
        (pd.Timestamp("2024-01-02"), "2024-01-02T00:00:00"),
        (np.datetime64("2024-01-02"), "2024-01-02"),
        (np.datetime64("2024-01-02", "ns"), "2024-01-02T00:00:00"),
        (datetime.time(9, 30), "09:30:00"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (["a", 1, None, True], '["a", 1, null, true]'),
        (("é", {"b": [1.5]}), '["é", {"b": [1.5]}]'),
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        ({"day": datetime.date(2024, 1, 2), "n": np.int64(1)}, '{"day": "2024-01-02", "n": 1}'),
        ("2024-01-02 ", "2024-01-02 "),
        ("", ""),
    ],
)
def test_what_cells_become(cell: Any, text: str) -> None:
    assert cell_text(cell) == text


@pytest.mark.parametrize(
    "cell",
    [
        float("inf"), -np.inf, [float("nan")], {"a": float("inf")}, [pd.NaT], [pd.NA],
        [np.datetime64("NaT")], b"bytes", bytearray(b"x"), {1, 2}, object(), 3j, {1: "key"},
        datetime.timedelta(1), np.timedelta64(1, "s"), decimal.Decimal("Infinity"),
        "half \ud800", ["half \udfff"],
    ],
)  # fmt: skip
def test_what_has_no_text_is_refused(cell: Any) -> None:
    """JSON can't represent these values, so no client could send them."""
    with pytest.raises(BadInput, match="a cell holds"):
        cell_text(cell)


def test_lists_within_lists_have_an_end() -> None:
    """A value nested too deeply is refused instead of ending the program."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadInput, match="more than 100 lists and objects inside each other"):
        cell_text(deep)


@pytest.mark.parametrize(
    "cell",
    [
        None,
        float("nan"),
        np.nan,
        np.float32("nan"),
        pd.NA,
        pd.NaT,
        np.datetime64("NaT"),
        decimal.Decimal("NaN"),
    ],
)
def test_missing_cells(cell: Any) -> None:
    """Each of these values counts as missing, and its text is empty."""
    assert is_missing(cell) and cell_text(cell) == ""


@pytest.mark.parametrize(
    "cell", ["", "nan", "None", "NA", "null", 0, False, [], {}, 0.0, np.int64(0)]
)
def test_cells_that_are_not_missing(cell: Any) -> None:
    """The words "nan" and "null" are texts; zero, false and an empty list are values."""
    assert not is_missing(cell)


def test_blank_texts() -> None:
    assert [is_blank(text) for text in ("", " \n\t", "\u00a0", "a", " a ")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_early_prompts_keep_their_conversion() -> None:
    """Versions tuned with Python's ``str`` of a cell keep that conversion."""
    assert [early_cell_text(cell) for cell in (None, True, 1.5, ["a"])] == [
        "",
        "True",
        "1.5",
        "['a']",
    ]
