"""Demonstrations: rows with their answers in front of an input."""

from __future__ import annotations

from collections import Counter

import pytest
from models import tiny_tokenizer

from orchestrator.data.demonstrations import chosen, demonstrations, written_out
from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer

ROWS = [{"text": f"row {number}", "label": number % 3} for number in range(30)]
TEXTS = Verbalizer((0, 1, 2), (" no", " yes", " perhaps"))


def encoder(
    template: str = "{text}\nspam?", verbalizer: Verbalizer | None = TEXTS, most: int = 60
) -> Encoder:
    return Encoder(tiny_tokenizer(), Template(template), verbalizer, most, 16)


@pytest.mark.parametrize(
    ("template", "verbalizer", "expected"),
    [
        ("{text}\nspam?", TEXTS, "row 4\nspam? yes"),
        ("{*}{text} It is{_}.", TEXTS, "row 4 It is yes."),
        ("{text}:", None, "row 4:1"),
    ],
)
def test_the_answer_stands_where_the_model_gives_it(
    template: str, verbalizer: Verbalizer | None, expected: str
) -> None:
    """The answer is behind the input or at the blank.

    It is the verbalizer's text, or the column's value without a verbalizer.
    """
    assert written_out(encoder(template, verbalizer), ROWS[4], "label") == expected


@pytest.mark.parametrize(("count", "each"), [(3, [1, 1, 1]), (4, [1, 1, 2]), (8, [2, 3, 3])])
def test_labels_are_shown_equally_often(count: int, each: list[int]) -> None:
    """Labels are balanced in any order of the data, and the seed decides which rows are chosen."""
    rows = sorted(ROWS, key=lambda row: row["label"])
    found = chosen(encoder(), rows, "label", count, seed=1)
    assert sorted(Counter(row["label"] for row in found).values()) == each
    assert found == chosen(encoder(), rows, "label", count, seed=1)
    assert found != chosen(encoder(), rows, "label", count, seed=2)


def test_rows_that_would_be_cut_are_not_shown() -> None:
    """A demonstration is never cut: rows too long for the limit are not chosen."""
    long = [{"text": "the quick brown fox " * 20, "label": 0}]
    found = chosen(encoder(most=20), [*long * 50, *ROWS], "label", 6, seed=0)
    assert all(len(row["text"]) < 10 for row in found) and len(found) == 6
    assert chosen(encoder(most=20), long, "label", 6, seed=0) == []


def test_there_are_as_many_as_have_room() -> None:
    """As many demonstrations as fit are shown, each followed by an empty line, or none."""
    text, number = demonstrations(
        encoder(), ROWS, "label", 4, 0, lambda text: text.count("spam?") <= 2
    )
    assert number == 2 and text.count("\n\n") == 2 and text.endswith("\n\n")
    assert demonstrations(encoder(), ROWS, "label", 4, 0, lambda text: False) == ("", 0)
    assert demonstrations(encoder(), ROWS, "label", 0, 0, lambda text: True) == ("", 0)
