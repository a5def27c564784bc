"""Token rows with places for virtual tokens and for the answer.

Token ids are never negative, so negative entries of a row can mark the places that its template
sets:

* In an encoded input, ``BLANK`` is where a masked model fills in the answer, and ``marker(m)`` is
  where the m-th group of virtual tokens stands. Both are independent of the prompt's length.
* In a placed row, -(k + 1) is virtual token k of the row's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

BLANK = -1


def marker(group: int) -> int:
    """Return the entry that stands for the ``group``-th group of virtual tokens, counted from 0."""
    return -(2 + group)


def shares(virtual_tokens: int, groups: int) -> list[int]:
    """Spread P virtual tokens evenly over the groups; earlier groups get the remainder."""
    return [virtual_tokens // groups + (group < virtual_tokens % groups) for group in range(groups)]


def text_ids(ids: Sequence[int]) -> list[int]:
    """Return a row's tokens, without the entries that mark places."""
    return [entry for entry in ids if entry >= 0]


def placed(ids: Sequence[int], virtual_tokens: int, blank: Sequence[int] = ()) -> list[int]:
    """Return an encoded input with its virtual tokens numbered and its blank filled.

    Virtual tokens are numbered in order. The tokens ``blank`` take the place of the blank.
    """
    groups = max((-entry - 1 for entry in ids if entry < BLANK), default=0)
    if not groups and not (blank and BLANK in ids):
        return text_ids(ids)
    counts = shares(virtual_tokens, groups) if groups else []
    row: list[int] = []
    next_virtual = 0
    for entry in ids:
        if entry >= 0:
            row.append(entry)
        elif entry == BLANK:
            row.extend(blank)
        else:
            count = counts[-entry - 2]
            row.extend(-(next_virtual + offset + 1) for offset in range(count))
            next_virtual += count
    return row
