"""Pure functions that choose the rows of a step's batch and split a batch with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np


def step_rows(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the row numbers of a trial's batch at 0-based ``step``.

    Each epoch is a seeded permutation of all rows. The result depends on the arguments alone, so a
    checkpoint needs only the step count to restore the position in the data. Batches run over the
    end of an epoch into the next one, and a batch larger than the data repeats rows.
    """
    first_position = step * batch_size
    return [
        int(_epoch(num_rows, seed, position // num_rows)[position % num_rows])
        for position in range(first_position, first_position + batch_size)
    ]


@lru_cache(maxsize=256)
def _epoch(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def longest_first(lengths: Sequence[int], max_tokens: int, ways: int = 1) -> Iterator[list[int]]:
    """Yield the rows of each forward, longest rows first.

    Each of the ``ways`` workers or threads that share a forward gets at most ``max_tokens`` padded
    tokens of it, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    start = 0
    while start < len(order):
        rows = order[start : start + ways * max(1, max_tokens // lengths[order[start]])]
        start += len(rows)
        yield rows


def length_groups(
    lengths: Sequence[int],
    overhead: int,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    ways: int = 1,
) -> list[list[int]]:
    """Split rows, sorted by length, into groups of the least total cost.

    Each group is padded to its longest row. It costs rows x longest tokens, plus ``overhead``
    tokens for its own forward. A group of several rows holds at most ``max_tokens`` padded tokens,
    and any group at most ``max_rows`` rows. If groups are divided among ``ways`` workers, costs and
    limits count the rows of one worker. The solution is exact except for ``max_rows``; it is found
    by dynamic programming over at most 64 distinct cuts.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    boundaries = _cuts([lengths[row] for row in order])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(boundaries)):
        options = []
        longest = lengths[order[boundaries[end] - 1]]
        for start in range(end):
            rows = -(-(boundaries[end] - boundaries[start]) // ways)
            if max_tokens is None or rows * longest <= max_tokens or start == end - 1:
                options.append((best[start][0] + overhead + rows * longest, start))
        best.append(min(options))
    groups, end = [], len(boundaries) - 1
    while end:
        start = best[end][1]
        groups.append(order[boundaries[start] : boundaries[end]])
        end = start
    pieces = []
    for group in reversed(groups):
        pieces += _chunks(group, lengths, max_tokens, max_rows, ways)
    return pieces


def _cuts(sorted_lengths: list[int]) -> list[int]:
    """Return the places where a group may end: where the length changes, thinned to at most 64."""
    changes = [
        i for i in range(1, len(sorted_lengths)) if sorted_lengths[i] != sorted_lengths[i - 1]
    ]
    step = max(1, -(-len(changes) // 63))
    return [0, *changes[step - 1 :: step], len(sorted_lengths)]


def _chunks(
    group: list[int],
    lengths: Sequence[int],
    max_tokens: int | None,
    max_rows: int | None,
    ways: int,
) -> list[list[int]]:
    """Cut a group that is still too large, with many rows of one length, into equal pieces."""
    longest = max((lengths[row] for row in group), default=1)
    most = len(group) if max_tokens is None else max(1, max_tokens // max(1, longest))
    most = ways * (most if max_rows is None else min(most, max_rows))
    return [group[start : start + most] for start in range(0, len(group), most)]
