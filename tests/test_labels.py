"""Labels are compared by meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import BadInput
from orchestrator.job.labels import NUMBER, TEXT, contradictions, label_key, label_text, spelled

texts = st.text(max_size=8) | st.from_regex(
    r"[-+]?[0-9]{1,4}(\.[0-9]{1,3})?(e[0-9])?", fullmatch=True
)


@given(st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
@example(0.0)
@example(-0.0)
@example(1e22)
@example(10**22)
@example(True)
def test_a_label_is_what_its_json_text_says(label: Any) -> None:
    """A number or truth value and its JSON text are the same label."""
    assert label_key(label) == label_key(json.dumps(label)) == label_key(label_text(label))


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_is_the_same_label_with_a_point_and_without(number: int) -> None:
    assert label_key(number) == label_key(float(number)) == label_key(str(float(number)))


@given(texts, texts)
@example("007", "7")
@example("1.10", "1.1")
@example("+1", "1")
@example("1", "1.0")
@example("\uff11", "1")
@example("-0", "0")
@example("1e5", "100000")
@example("True", "true")
@example("yes", "true")
@example("nan", "NaN")
@example("9" * 5000, "9" * 5001)
def test_two_texts_are_one_label_only_if_both_spell_the_same_value(one: str, other: str) -> None:
    """Leading zeros, signs, trailing zeros and non-ASCII digits keep texts apart."""
    if label_key(one) == label_key(other) and one != other:
        kind = label_key(one)[0]
        assert kind != TEXT
        assert kind != NUMBER or {one, other} == {
            one.removesuffix(".0"),
            one.removesuffix(".0") + ".0",
        }


@pytest.mark.parametrize(
    "text", ["007", "1.10", "+1", "-0", "1e5", " 1", "1_0", "yes", "no", "inf", "nan", ""]
)
def test_texts_that_only_resemble_a_value_stay_texts(text: str) -> None:
    assert label_key(text) == (TEXT, text)


def test_a_truth_value_is_no_number_and_nothing_is_a_missing_one() -> None:
    """1 is not true and "1" is not "true"; None and NaN are not texts."""
    assert len({label_key(label) for label in (1, True, 0, False, None, "", "None", "nan")}) == 8
    assert label_key(float("nan")) == label_key(None)


@pytest.mark.parametrize("cell", [[1], {"a": 1}, b"1", (1,), {1}])
def test_lists_objects_and_bytes_are_no_labels(cell: Any) -> None:
    with pytest.raises(BadInput, match="lists or objects, which can't be labels"):
        label_key(cell)


def test_contradictions_have_both_spellings() -> None:
    """Keys of equal meaning but different values are reported with both spellings."""
    found = list(
        contradictions({1: " a", "1": " b", "true": " c", "x": " d", 2: " e", "2.0": " e"})
    )
    assert found == ["1 and \"1\" are the same label, with the texts ' a' and ' b'"]
    assert [spelled(label) for label in (1, "1", 1.0, True, "true", "é")] == [
        "1", '"1"', "1.0", "true", '"true"', '"é"'
    ]  # fmt: skip
