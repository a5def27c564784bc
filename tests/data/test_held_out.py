"""Held-out rows: labels keep their share, equal inputs stay together, the seed decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data.test_dataset import data, files, write
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.dataset import load_rows, set_aside
from orchestrator.data.source_row import Row

LABELS = {str(number): f" {number}" for number in range(6)}
FRACTIONS = st.floats(0.01, 0.49)
SEEDS = st.integers(0, 99)
VERBALIZERS = st.sampled_from([LABELS, None])


def rows(labels: list[int]) -> list[Row]:
    return [{"text": str(number), "label": str(label)} for number, label in enumerate(labels)]


def of_label(part: list[Row]) -> Counter[str]:
    return Counter(row["label"] for row in part)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), FRACTIONS, SEEDS, VERBALIZERS)
@settings(deadline=None)
def test_every_label_keeps_its_share(
    labels: list[int], fraction: float, seed: int, verbalizer: Any
) -> None:
    """A label's number of held-out rows is its share, within one.

    Every label with several inputs keeps at least one row.
    """
    whole = rows(labels)
    kept, aside = set_aside(whole, fraction, data("x", split_seed=seed, verbalizer=verbalizer))
    assert sorted([*kept, *aside], key=str) == sorted(whole, key=str) and kept and aside
    if len(kept) + len(aside) == len(of_label(whole)):
        return  # every label has one row
    for label, count in of_label(whole).items():
        if count > 1:
            assert abs(of_label(aside)[label] - fraction * count) < 1.001
            assert of_label(kept)[label]
    wanted = max(1, round(fraction * len(whole)))
    assert len(aside) <= wanted + max(1, wanted // 4)
    if all(count > 1 for count in of_label(whole).values()):
        assert len(aside) >= wanted


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=2, max_size=80),
    FRACTIONS,
    SEEDS,
    VERBALIZERS,
)
@settings(deadline=None)
def test_equal_inputs_stay_together(
    pairs: list[tuple[int, int]], fraction: float, seed: int, verbalizer: Any
) -> None:
    """No input is on both sides, no row is lost, and the draw can be repeated.

    This holds whatever the labels are.
    """
    whole: list[Row] = [{"text": str(text), "label": str(label)} for text, label in pairs]
    spec = data("x", split_seed=seed, verbalizer=verbalizer)
    kept, aside = set_aside(whole, fraction, spec)
    assert not {row["text"] for row in kept} & {row["text"] for row in aside}
    assert sorted([*kept, *aside], key=str) == sorted(whole, key=str)
    assert kept and bool(aside) == (len({row["text"] for row in whole}) > 1)
    assert set_aside(whole, fraction, spec) == (kept, aside)


@given(st.lists(st.integers(0, 30), min_size=3, max_size=80), st.integers(1, 3), FRACTIONS, SEEDS)
@settings(deadline=None)
def test_inputs_are_left_for_the_splits_to_come(
    texts: list[int], stays: int, fraction: float, seed: int
) -> None:
    """At least ``stays`` different inputs are kept, if the rows have that many."""
    whole: list[Row] = [{"text": str(text), "label": "0"} for text in texts]
    kept, _ = set_aside(whole, fraction, data("x", split_seed=seed, verbalizer=LABELS), stays)
    assert len({row["text"] for row in kept}) >= min(stays, len(set(texts)))


@pytest.mark.parametrize("seed", range(5))
def test_rare_labels_are_in_every_split(tmp_path: Path, seed: int) -> None:
    """Four rare labels beside a frequent one are in train, validation and test.

    The sizes of the splits stay near the fraction.
    """
    labels = [0] * 180 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 3
    path = write(tmp_path / "a.jsonl", rows(labels))  # type: ignore[arg-type]
    spec = data(files(train=path), verbalizer=LABELS, split_seed=seed)
    found = load_rows(spec)
    for split in ("train", "validation", "test"):
        assert len(of_label(found[split])) == 5
    assert len(found.test) in range(20, 24) and len(found.validation) in range(17, 23)
    random_draw = load_rows(spec.model_copy(update={"held_out": "random"}))
    assert len(random_draw.test) == 20 and random_draw != found


def test_many_equal_rows_do_not_fill_a_split() -> None:
    """An input that has most of its label's rows stays in train, so sizes are as requested."""
    whole: list[Row] = [{"text": "same", "label": "0"}] * 60 + rows([0] * 20 + [1] * 20)
    for seed in range(10):
        _, aside = set_aside(whole, 0.1, data("x", split_seed=seed, verbalizer=LABELS))
        assert len(aside) == 10 and of_label(aside) == {"0": 8, "1": 2}


def test_a_label_with_large_groups_takes_its_part_only() -> None:
    """Groups of two rows: over all labels, sizes are as near as whole groups allow."""
    whole: list[Row] = [{"text": str(n // 2), "label": str(n % 100 // 50)} for n in range(100)]
    for seed in range(10):
        _, aside = set_aside(whole, 0.1, data("x", split_seed=seed, verbalizer=LABELS))
        assert len(aside) == 10 and set(of_label(aside).values()) <= {4, 6}


def test_the_random_draw_is_the_one_of_earlier_releases() -> None:
    """A search begun with an earlier release finds the same rows."""
    whole = rows([0, 1] * 20)
    _, aside = set_aside(whole, 0.2, data("x", held_out="random", split_seed=3, verbalizer=LABELS))
    assert [int(row["text"]) for row in aside] == [3, 5, 14, 18, 26, 27, 31, 35]
