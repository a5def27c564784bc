"""Which rows make a step's batch, and how a batch is split so that little is padded. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def step_rows(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of a trial's batch at ``step`` (0-based): seeded epochs, each row once an epoch.

    A function of its arguments alone, so that the step count is the whole data position of a checkpoint. Batches run
    over the end of an epoch into the next one; a batch larger than the data repeats rows.
    """
    first = step * batch_size
    return [
        int(_epoch(num_rows, seed, place // num_rows)[place % num_rows])
        for place in range(first, first + batch_size)
    ]


@lru_cache(maxsize=256)
def _epoch(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def length_groups(
    lengths: Sequence[int],
    overhead: int,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    ways: int = 1,
) -> list[list[int]]:
    """Split rows, sorted by length, into groups that each pad to their longest row, at the least cost.

    A group costs rows x longest tokens, plus ``overhead`` tokens for its own forward; a group of several rows holds
    at most ``max_tokens`` padded tokens, any group at most ``max_rows`` rows. A group that is dealt out to ``ways``
    workers counts with the rows of one of them. Exact but for ``max_rows``, by dynamic programming over at most 64
    distinct cuts.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cuts = _cuts([lengths[row] for row in order])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(cuts)):
        options = []
        for start in range(end):
            rows, longest = -(-(cuts[end] - cuts[start]) // ways), lengths[order[cuts[end] - 1]]
            if max_tokens is None or rows * longest <= max_tokens or start == end - 1:
                options.append((best[start][0] + overhead + rows * longest, start))
        best.append(min(options))
    groups, end = [], len(cuts) - 1
    while end:
        start = best[end][1]
        groups.append(order[cuts[start] : cuts[end]])
        end = start
    return [
        piece
        for group in reversed(groups)
        for piece in _chunks(group, lengths, max_tokens, max_rows, ways)
    ]


def _cuts(sorted_lengths: list[int]) -> list[int]:
    """Places where a group may end: after a change of length, thinned to at most 64."""
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
    """A group that is still too large (many rows of one length) is cut into equal pieces."""
    longest = max((lengths[row] for row in group), default=1)
    most = len(group) if max_tokens is None else max(1, max_tokens // max(1, longest))
    most = ways * (most if max_rows is None else min(most, max_rows))
    return [group[start : start + most] for start in range(0, len(group), most)]
