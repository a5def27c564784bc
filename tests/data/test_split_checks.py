"""Splits that can't be judged are refused or warned about, with counts and row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data.test_dataset import data, files, write
from models import tiny_tokenizer

from orchestrator.data.dataset import RowSplits, load_rows
from orchestrator.data.encoding import make_encoder
from orchestrator.data.source_row import Row, SourceRow
from orchestrator.data.split_checks import Finding, check_distinct_tokens, check_splits, judge
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec

VERBALIZER = {"a": " x", "b": " y"}
CLASSES = data("x", verbalizer=VERBALIZER)
TEXTS = data("x")


def rows(start: int, labels: Sequence[str], **cells: Any) -> list[Row]:
    """Rows with different texts, numbered from ``start``."""
    return [
        {"text": f"text {start + n}", "label": label, **cells} for n, label in enumerate(labels)
    ]


def splits(train: list[Row], validation: list[Row], test: list[Row]) -> RowSplits:
    return RowSplits(train, validation, test)


FULL = ["a", "b"] * 10
SOUND = splits(rows(0, FULL), rows(100, FULL), rows(200, FULL))


def found(of: RowSplits, spec: DataSpec = CLASSES, *, learns: bool = True) -> list[Finding]:
    return check_splits(of, spec, learns=learns)


def warned(of: RowSplits, spec: DataSpec = CLASSES, *, learns: bool = True) -> list[str]:
    """Return the messages of the findings, all of which are warnings."""
    findings = found(of, spec, learns=learns)
    assert {finding.severity for finding in findings} <= {"warn"}
    return [finding.message for finding in findings]


def refused(of: RowSplits, spec: DataSpec = CLASSES) -> str:
    """Return the message of the only refusal, with which ``judge`` refuses the splits too."""
    (message,) = [finding.message for finding in found(of, spec) if finding.severity == "refuse"]
    with pytest.raises(BadInput) as refusal:
        judge(of, spec)
    assert refusal.value.message == message and refusal.value.hint
    return message


def test_sound_splits_have_no_findings() -> None:
    """Ten rows of each class in each split and no repeated input give no finding."""
    assert found(SOUND) == [] and judge(SOUND, CLASSES) == ()


@pytest.mark.parametrize("count", [1, 20])
def test_one_class_is_refused(count: int) -> None:
    """With a single label any prompt is always right, even if the verbalizer has more keys."""
    one = splits(rows(0, ["a"] * count), rows(100, ["a"] * count), rows(200, ["a"] * count))
    assert refused(one) == "all rows have the label 'a': accuracy would be 1.0 with any prompt"


def test_one_text_to_generate_is_refused() -> None:
    """With one target, a prompt that ignores the input is always right.

    With lists of references all targets may be the same text.
    """
    one = splits(rows(0, ["a"] * 9), rows(100, ["a"] * 9), rows(200, ["a"] * 9))
    assert (
        refused(one, TEXTS)
        == "all rows have the target 'a': a prompt that ignores the input is always right"
    )
    assert warned(one, TEXTS.model_copy(update={"references": "right"})) == []


def test_one_input_is_refused() -> None:
    """Rows that differ only in their labels can't be told apart; the message shows the input."""
    same = [{"text": "same", "label": label} for label in FULL]
    message = "all 60 rows have the same input 'same?': nothing can be told apart"
    assert refused(splits(same, same, same)) == message
    assert refused(splits(same, same, same), TEXTS) == message


def test_a_split_with_one_input_is_warned_about() -> None:
    """One input in one split is only a warning if the other splits have more inputs."""
    same = [{"text": "same", "label": "a"}] * 20
    (message,) = warned(splits(rows(0, FULL), same, rows(200, FULL)), TEXTS)
    assert message == "all 20 rows of validation have the same input 'same?'"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_class_that_a_split_lacks_is_warned_about(split: str) -> None:
    """The warning names the split, the class and the consequence, for each of the splits."""
    three = data("x", verbalizer={**VERBALIZER, "c": " z"})
    parts = {
        name: rows(100 * n, ["a", "b", "c"] * 10)
        for n, name in enumerate(("train", "validation", "test"))
    }
    parts[split] = [row for row in parts[split] if row["label"] != "c"]
    (message,) = warned(splits(**parts), three)
    assert message.startswith(f"{split} has no row of class 'c', which other splits have: ")
    parts[split] = [row for row in parts[split] if row["label"] == "a"]
    (message,) = warned(splits(**parts), three)
    assert message.startswith(
        f"{split} has no row of classes 'b' and 'c', which other splits have: a prompt"
    )
    assert ("can only learn to answer 'a'" in message) == (split == "train")
    assert ("always answers 'a' has an accuracy of 1.0" in message) == (split != "train")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_few_rows_of_a_class_are_warned_about_with_their_count(split: str) -> None:
    """Nine rows of a class give a warning, ten do not."""
    parts = {name: rows(100 * n, FULL) for n, name in enumerate(("train", "validation", "test"))}
    parts[split] = parts[split][1:]
    (message,) = warned(splits(**parts))
    assert message.startswith(f"{split} has 9 rows of class 'a': ")
    assert warned(splits(**parts), TEXTS) == []


def test_many_classes_are_named_in_part() -> None:
    """A message names at most five classes and counts the others."""
    names = [str(number) for number in range(12)]
    many = data("x", verbalizer={name: f" {name}" for name in names})
    plenty = rows(0, names * 10)
    (absent, few) = warned(
        splits(plenty, rows(1000, names * 10), rows(2000, [*names[:2] * 10, *names[2:9]])), many
    )
    assert "classes '9', '10' and '11'" in absent
    assert "1 row of class '6' and 2 more classes" in few


def test_rows_that_train_shares_are_warned_about_with_their_places() -> None:
    """The warning has the count, and the position of one such row in both files."""
    shared = [SourceRow(rows(0, ["a"])[0], source="test.csv", number=3, line=4)]
    train = [
        SourceRow(row, source="train.jsonl", number=n, line=n)
        for n, row in enumerate(rows(0, FULL), 1)
    ]
    (message,) = warned(splits(train, rows(100, FULL), [*shared, *rows(200, FULL)]))
    assert message.startswith("1 of 21 rows of test have an input that train has too")
    assert "test.csv:4 (row 3) and train.jsonl:1 (row 1)" in message


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_train_has_whole_is_refused(split: str) -> None:
    """A split whose inputs all occur in train is refused, whatever the labels.

    Methods without training only get a warning, since the train rows may serve as demonstrations.
    """
    parts = {name: rows(100 * n, FULL) for n, name in enumerate(("train", "validation", "test"))}
    parts[split] = parts["train"]
    message = refused(splits(**parts))
    assert message.startswith(
        f"every row of {split} has an input that train has too, for instance row 1 of {split}"
    )
    (message,) = warned(splits(**parts), learns=False)
    assert message.startswith(f"20 of 20 rows of {split}")


def test_rows_shared_by_validation_and_test_are_warned_about() -> None:
    """Trials are chosen on validation rows, so those rows say less as a test."""
    (message,) = warned(splits(rows(0, FULL), rows(100, FULL), rows(100, FULL)))
    assert message.startswith("20 of 20 rows of test have an input that validation has too")


def test_one_input_with_two_labels_is_warned_about() -> None:
    """The warning has the number of such inputs and two of the rows.

    Several target texts for one input are no contradiction.
    """
    again = [{"text": "text 0", "label": "b"}, {"text": "text 0", "label": "a"}]
    twice = splits([*rows(0, FULL), *again], rows(100, FULL), rows(200, FULL))
    (message,) = warned(twice)
    assert message.startswith(
        "1 input occurs with different labels in train, for instance row 1 of train with 'a'"
    )
    assert message.endswith("and row 21 of train with 'b'")
    assert warned(twice, TEXTS) == [] == warned(twice, learns=False)


def test_a_column_that_tells_the_label_is_warned_about() -> None:
    """A column in the template that determines the label gives a warning.

    A column whose value several labels share does not.
    """
    spec = data("x", verbalizer=VERBALIZER, template="{text} {kind}")

    def of(kinds: dict[str, str]) -> RowSplits:
        parts = (rows(start, FULL) for start in (0, 100, 200))
        return RowSplits(
            *([{**row, "kind": kinds[row["label"]]} for row in part] for part in parts)
        )

    (message,) = warned(of({"a": "ham", "b": "spam"}), spec)
    assert message.startswith("column 'kind' of data.template tells the answer")
    assert warned(of({"a": "sms", "b": "sms"}), spec) == []


def test_a_text_to_generate_that_is_in_the_input_is_warned_about() -> None:
    """A column that equals the target in every row gives a warning, whatever its name."""
    parts = [
        [{**row, "copy": row["label"]} for row in rows(start, FULL)] for start in (0, 100, 200)
    ]
    (message,) = warned(RowSplits(*parts), data("x", template="{text} {copy}"))
    assert message.startswith("column 'copy' of data.template tells the answer")


def test_pieces_of_texts_are_compared_whole() -> None:
    """With prefix_lm, rows with the same whole text are shared rows.

    A prefix common to many texts alone is not.
    """
    spec = data("x", prefix_lm="text", template="{prefix}", target="continuation")

    def pieces(start: int) -> list[Row]:
        return [{"prefix": "The", "continuation": f" end {start + n}"} for n in range(20)]

    assert warned(splits(pieces(0), pieces(100), pieces(200)), spec) == []
    assert refused(splits(pieces(0), pieces(0), pieces(200)), spec).startswith(
        "every row of validation"
    )


def test_train_is_not_judged_where_nothing_is_trained() -> None:
    """A written prompt needs no rows of each class in train."""
    bare = splits(rows(0, ["a"]), rows(100, FULL), rows(200, FULL))
    assert len(warned(bare)) == 2 and warned(bare, learns=False) == []


def test_a_search_that_has_begun_goes_on_with_a_warning() -> None:
    """Findings that refuse a new search are warnings for a search that has already begun.

    An earlier release may have let such a search begin.
    """
    one = splits(rows(0, ["a"] * 9), rows(100, ["a"]), rows(200, ["a"]))
    (warning,) = judge(one, CLASSES, begun=True)
    assert warning.startswith("all rows have the label 'a'") and warning.endswith(
        "correct data.target."
    )


def test_inputs_that_become_the_same_tokens_are_refused() -> None:
    """Texts that differ only behind the cut are the same input to the model."""
    spec = data("x", template="{text}", max_input_tokens=4)
    long = [
        {"text": "the quick brown fox jumps over the lazy dog " * 5 + row["text"], "label": "a"}
        for row in rows(0, FULL)
    ]
    encoder = make_encoder(spec, splits(long, long, long), tiny_tokenizer())
    ids = [encoder.encode_input(row) for row in long]
    with pytest.raises(
        BadInput, match=r"all inputs have the same \d token ids(.|\n)*max_input_tokens \(now 4\)"
    ):
        check_distinct_tokens({"train": ids, "test": ids}, 4)
    check_distinct_tokens({"train": ids, "test": [[1]]}, 4)


def test_rows_of_one_input_leave_nothing_to_set_aside(tmp_path: Path) -> None:
    """The message says that all rows have one input, and does not blame the missing splits."""
    path = write(tmp_path / "a.jsonl", [{"text": "same", "label": label} for label in FULL])
    with pytest.raises(BadInput, match=r"all 20 rows of train have the same input 'same\?'"):
        load_rows(data(files(train=path), verbalizer=VERBALIZER))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_inputs_to_set_aside(tmp_path: Path, count: int) -> None:
    """One or two inputs are too few for three splits, and the message has their number.

    Three inputs are enough.
    """
    path = write(tmp_path / "a.jsonl", rows(0, ["a", "b"][:count]))
    with pytest.raises(
        BadInput, match=rf"split can be set aside: the {count} rows of train have {count} different"
    ):
        load_rows(data(files(train=path), verbalizer=VERBALIZER))
    path = write(tmp_path / "b.jsonl", rows(0, ["a", "b", "b"]))
    assert load_rows(data(files(train=path), verbalizer=VERBALIZER)).counts == dict.fromkeys(
        SPLIT_NAMES, 1
    )


SPLIT_NAMES = ("train", "validation", "test")
