"""Templates and verbalizers, for any text."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from models import spaced_tokenizer, tiny_tokenizer

from orchestrator.data.cells import cell_text
from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer, continuation_ids
from orchestrator.errors import BadInput

texts = st.text(max_size=20)
cells = (
    texts
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
)
# A template as pieces: literals and names of columns.
pieces = st.lists(
    st.tuples(st.just("literal"), texts) | st.tuples(st.just("column"), st.sampled_from("abc")),
    max_size=8,
)
DIGITS = {0: " zero", 1: " one", 2: " two"}


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def written(parts: list[tuple[str, str]]) -> Template:
    return Template(
        "".join(escaped(text) if kind == "literal" else f"{{{text}}}" for kind, text in parts)
    )


@given(pieces, st.fixed_dictionaries({"a": cells, "b": cells, "c": cells}))
@example([("literal", "{"), ("column", "a"), ("literal", "}")], {"a": "{b}", "b": "{{", "c": None})
def test_fill_puts_values_in_place(parts: list[tuple[str, str]], row: dict[str, Any]) -> None:
    """Literals are kept, braces included.

    Values go in unchanged and are not parsed as templates.
    """
    shown = {name: cell_text(cell) for name, cell in row.items()}
    assert written(parts).fill(row) == "".join(
        text if kind == "literal" else shown[text] for kind, text in parts
    )


@given(pieces)
@example([("column", "a"), ("literal", "is {that} it?}")])
@example([("column", "a"), ("literal", "}")])
def test_columns_and_tail(parts: list[tuple[str, str]]) -> None:
    """Columns are listed once, in order; the tail is the unescaped text behind the last one."""
    columns = [text for kind, text in parts if kind == "column"]
    assert written(parts).columns == tuple(dict.fromkeys(columns))
    last = max((place for place, (kind, _) in enumerate(parts) if kind == "column"), default=-1)
    assert written(parts).tail == "".join(text for _, text in parts[last + 1 :])


def test_a_missing_column_is_named() -> None:
    """The message has the column and the columns that the row has instead."""
    with pytest.raises(
        BadInput,
        match=r"names column 'text', the row has \['label', 'sentence'\](.|\n)*data\.rename",
    ):
        Template("{text}?").fill({"sentence": "a", "label": 1})


def test_a_bare_text_fills_the_only_column() -> None:
    """A served input may be a text if the template has one column, even if named twice."""
    assert Template("{x} and {x}").row("a") == {"x": "a"}
    assert Template("{x} {y}").row({"x": "a", "y": "b"}) == {"x": "a", "y": "b"}
    with pytest.raises(BadInput, match=r"can't fill the columns \['x', 'y'\]"):
        Template("{x} {y}").row("a")


@given(texts, st.text(min_size=1, max_size=20))
def test_continuation_round_trip(before: str, text: str) -> None:
    """The tokens of the text before and of its continuation together decode to both texts."""
    tokenizer = tiny_tokenizer()
    ids = continuation_ids(tokenizer, before, text)
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*head, *ids], clean_up_tokenization_spaces=False) == before + text
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("tail", ["", "\nSpam?", " Answer:", "}"])
@pytest.mark.parametrize("answer", [" ham", "ham", " a place", "!", " é", "日本"])
def test_no_space_appears_in_front_of_an_answer(tail: str, answer: str) -> None:
    """A tokenizer that puts a space before every text adds none between template and answer."""
    tokenizer = spaced_tokenizer()
    template = Template("{text}" + escaped(tail))
    ids = Encoder(tokenizer, template, None, 100, 100).answer_ids(answer)
    head = tokenizer("the fox" + tail, add_special_tokens=False)["input_ids"]
    assert (
        tokenizer.decode([*head, *ids], clean_up_tokenization_spaces=False)
        == "the fox" + tail + answer
    )


def test_a_verbalizer_holds_what_the_data_has() -> None:
    """Keys that no row has are left out, and the rest keep the spec's order."""
    made = Verbalizer.covering({2: " two", 0: " zero", 1: " one"}, [1, 2, 1])
    assert (made.labels, made.texts) == ((2, 1), (" two", " one"))
    assert [made.index(1), made.index(2), made.index(np.int64(2))] == [1, 0, 0]


def test_uncovered_labels_are_named() -> None:
    """The message lists at most five labels without a text, and the verbalizer's keys."""
    with pytest.raises(
        BadInput, match=r"does not cover label 3, 7 of the data; it has \[0, 1, 2\]"
    ):
        Verbalizer.covering(DIGITS, [0, 7, 3, 3])
    with pytest.raises(BadInput, match=r"label 10, 11, 12, 13, 14 of the data"):
        Verbalizer.covering(DIGITS, range(10, 30))
    with pytest.raises(BadInput, match=r"label '01' of the data(.|\n)*in quotes: \"01\""):
        Verbalizer.covering(DIGITS, ["1", "01"])
    with pytest.raises(BadInput, match=r"label None of the data"):
        Verbalizer.covering(DIGITS, [None])


def test_labels_that_share_a_text_are_named() -> None:
    """Two labels with one text are refused, unless the data lacks one of the labels."""
    shared = {0: " no", 1: " yes", "maybe": " no"}
    with pytest.raises(BadInput, match=r"gives labels \[0, 'maybe'\] the same text ' no'"):
        Verbalizer.covering(shared, [0, 1, "maybe"])
    assert Verbalizer.covering(shared, [0, 1]).texts == (" no", " yes")


def test_true_and_one_are_different_labels() -> None:
    """True and 1 are equal in Python, but neither covers the other, in any order of the data."""
    assert Verbalizer.covering({True: " yes", False: " no"}, [True, False]).index(True) == 0
    assert Verbalizer.covering({1: " yes", 0: " no"}, [0, 1]).index(0) == 1
    for seen in ([1], [True, 1], [1, True]):
        with pytest.raises(BadInput, match="does not cover label 1 of"):
            Verbalizer.covering({True: " yes"}, seen)
    for seen in ([True], [1, True], [True, 1]):
        with pytest.raises(BadInput, match="does not cover label True of"):
            Verbalizer.covering({1: " yes"}, seen)


@pytest.mark.parametrize(
    ("key", "same"),
    [
        (1, [1, 1.0, "1", "1.0", np.int64(1), np.float32(1), Decimal("1.00")]),
        ("1", [1, 1.0, "1"]),
        (1.5, [1.5, "1.5", np.float64(1.5)]),
        (True, [True, "true", "True", "TRUE", np.True_]),
        ("true", [True, "true"]),
        ("007", ["007"]),
        ("2024-01-02", ["2024-01-02", date(2024, 1, 2)]),
    ],
)
def test_labels_match_by_meaning(key: Any, same: list[Any]) -> None:
    """A label matches its key in any type that a file gives it, and keeps the spec's spelling."""
    made = Verbalizer.covering({"other": " no", key: " yes"}, ["other", *same])
    assert made.labels == ("other", key) and type(made.labels[1]) is type(key)
    assert [made.index(cell) for cell in same] == [1] * len(same)


def test_two_spellings_of_one_label_are_a_conflict_unless_their_texts_agree() -> None:
    """The message has both spellings.

    With equal texts they are one entry, spelled as the first.
    """
    with pytest.raises(
        BadInput, match=r"1 and \"1\" are the same label, with the texts ' a' and ' b'"
    ):
        Verbalizer.covering({1: " a", "1": " b"}, [1])
    with pytest.raises(BadInput, match=r"true and \"True\" are the same label"):
        Verbalizer.covering({True: " a", "True": " b"}, [True])
    made = Verbalizer.covering({0: " no", 1: " yes", "0": " no", "1": " yes"}, ["0", 1, "1"])
    assert (made.labels, made.texts) == ((0, 1), (" no", " yes"))


def test_labels_that_are_lists_are_refused() -> None:
    """A column of lists or objects can't be a label column."""
    with pytest.raises(BadInput, match="holds lists or objects"):
        Verbalizer.covering(DIGITS, [[0], [1]])
