"""Batch plans: every row is used exactly once, with little padding."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.batches import length_groups, step_rows

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)
limits = st.none() | st.integers(1, 400)


def cost(groups: list[list[int]], of: list[int], overhead: int) -> int:
    return sum(overhead + len(group) * max(of[row] for row in group) for group in groups)


@given(lengths, st.integers(0, 500), limits)
def test_groups_are_a_partition_within_the_limit(
    of: list[int], overhead: int, limit: int | None
) -> None:
    """Each row is in one group, and groups go from short rows to long ones.

    A group of several rows pads to at most the limit.
    """
    groups = length_groups(of, overhead, limit)
    assert sorted(itertools.chain(*groups)) == list(range(len(of)))
    for group in groups:
        assert group and (
            limit is None or len(group) == 1 or len(group) * max(of[row] for row in group) <= limit
        )
    assert [of[row] for group in groups for row in group] == sorted(of)


@given(lengths, limits, st.none() | st.integers(1, 5), st.integers(2, 4))
def test_limits_are_those_of_one_worker(
    of: list[int], limit: int | None, rows: int | None, ways: int
) -> None:
    """No worker's share of a group exceeds the limits.

    A group that is dealt out to ``ways`` workers may hold ``ways`` times as much.
    """
    groups = length_groups(of, 32, limit, rows, ways)
    assert sorted(itertools.chain(*groups)) == list(range(len(of)))
    for group in groups:
        for part in (group[place::ways] for place in range(ways)):
            assert rows is None or len(part) <= rows
            assert (
                limit is None or len(part) <= 1 or len(part) * max(of[row] for row in part) <= limit
            )
    assert len(length_groups(of, 10_000, None, 1, ways)) >= -(-len(of) // ways)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(0, 30))
@settings(deadline=None)
def test_groups_cost_least(of: list[int], overhead: int) -> None:
    """No other way to cut the sorted rows is cheaper; the test tries all of them."""
    order = sorted(range(len(of)), key=lambda row: of[row])
    options = []
    for cuts in itertools.product([False, True], repeat=len(of) - 1):
        groups = [[order[0]]]
        for row, cut in zip(order[1:], cuts, strict=True):
            groups.append([row]) if cut else groups[-1].append(row)
        options.append(cost(groups, of, overhead))
    assert cost(length_groups(of, overhead), of, overhead) == min(options)


def test_many_lengths_are_still_grouped_quickly_and_well() -> None:
    """A thousand different lengths pad less than 5 % of all tokens.

    For so many lengths only some of the possible cuts are considered.
    """
    of = list(range(1, 1001))
    groups = length_groups(of, 32)
    assert sorted(itertools.chain(*groups)) == list(range(1000))
    assert cost(groups, of, 0) < 1.05 * sum(of)


def test_overhead_decides_how_many_groups() -> None:
    """Free forwards mean no padding at all; very costly ones mean a single forward."""
    of = [3, 9, 3, 50, 9]
    assert length_groups(of, 0) == [[0, 2], [1, 4], [3]]
    assert len(length_groups(of, 10_000)) == 1


@given(st.integers(1, 30), st.integers(1, 45), st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_each_row_once_an_epoch(rows: int, batch: int, seed: int, epoch: int) -> None:
    """Batches in sequence use each row once an epoch, in every epoch."""
    end = (epoch + 1) * rows
    stream = [row for step in range(-(-end // batch)) for row in step_rows(rows, batch, seed, step)]
    assert sorted(stream[epoch * rows : end]) == list(range(rows))


@given(st.integers(1, 100), st.integers(1, 16), st.integers(0, 1000), st.integers(0, 1000))
def test_batches_are_a_function_of_their_arguments(
    rows: int, batch: int, seed: int, step: int
) -> None:
    """The same step gives the same rows, whichever steps were computed before.

    The step alone is the position in the data.
    """
    first = step_rows(rows, batch, seed, step)
    step_rows(rows, batch, seed + 1, step + 3)
    assert step_rows(rows, batch, seed, step) == first and len(first) == batch


def test_epochs_and_seeds_differ() -> None:
    """Every epoch has its own order, and so has every seed."""
    orders = {tuple(step_rows(50, 50, seed, step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("batch", [7, 20])
def test_a_batch_larger_than_the_data_repeats_rows(batch: int) -> None:
    """The number of times a row occurs in the batch differs by at most one between rows."""
    rows = step_rows(3, batch, 0, 0)
    counts = [rows.count(row) for row in range(3)]
    assert sum(counts) == batch and max(counts) - min(counts) <= 1
