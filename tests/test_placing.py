"""Rows with places for virtual tokens and for the answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.models.placeholders import BLANK, marker, placed, shares

tokens = st.lists(st.integers(0, 500), max_size=5)


@st.composite
def marked_rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """A row of token runs with markers in between, and the number of markers."""
    groups = draw(st.integers(0, 4))
    row = list(draw(tokens))
    for group in range(groups):
        row += [marker(group), *draw(tokens)]
    return row, groups


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_even(virtual_tokens: int, groups: int) -> None:
    """All virtual tokens are used; group sizes differ by at most one, earlier groups are larger."""
    found = shares(virtual_tokens, groups)
    assert sum(found) == virtual_tokens and len(found) == groups
    assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1


@given(marked_rows(), st.integers(0, 40))
def test_virtual_tokens_are_numbered_in_order(
    row: tuple[list[int], int], virtual_tokens: int
) -> None:
    """Each virtual token appears once, in order, at the markers; other tokens are unchanged."""
    ids, groups = row
    made = placed(ids, virtual_tokens)
    assert [entry for entry in made if entry >= 0] == [entry for entry in ids if entry >= 0]
    wanted = virtual_tokens if groups else 0
    assert [-entry - 1 for entry in made if entry < 0] == list(range(wanted))


@given(marked_rows(), st.lists(st.integers(0, 500), min_size=1, max_size=4), st.integers(0, 8))
def test_a_blank_is_filled(
    row: tuple[list[int], int], answer: list[int], virtual_tokens: int
) -> None:
    """The answer's tokens replace the blank, wherever it is; without an answer it is removed."""
    ids = [*row[0], BLANK, 7]
    assert placed(ids, virtual_tokens, answer)[-len(answer) - 1 :] == [*answer, 7]
    assert placed(ids, virtual_tokens) == [*placed(row[0], virtual_tokens), 7]


def test_the_papers_patterns() -> None:
    """Liu et al.'s (3, 3, 3) is nine tokens at three markers; (3, 3, 0) is six at two."""
    row = [marker(0), 5, marker(1), 6, marker(2)]
    assert placed(row, 9) == [-1, -2, -3, 5, -4, -5, -6, 6, -7, -8, -9]
    assert placed([marker(0), 5, marker(1), 6], 6) == [-1, -2, -3, 5, -4, -5, -6, 6]
    assert placed([marker(0), marker(1), 5, marker(2)], 6) == [-1, -2, -3, -4, 5, -5, -6]
    assert placed(row, 2) == [-1, 5, -2, 6]
