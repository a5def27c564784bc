"""Token rows that hold more than tokens: places for virtual tokens, and for the answer.

Token ids are never negative, so a row's negative entries are free for what its template places:

* in an encoded input, ``BLANK`` is where a masked model fills in the answer, and ``marker(m)`` is where the m-th group
  of virtual tokens stands; both are independent of the prompt's length;
* in a placed row, -(k + 1) is virtual token k of the row's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

BLANK = -1


def marker(place: int) -> int:
    """The entry that stands for the ``place``-th group of virtual tokens (from 0)."""
    return -(2 + place)


def shares(virtual_tokens: int, groups: int) -> list[int]:
    """How P virtual tokens spread over the groups: evenly, earlier groups one more."""
    return [virtual_tokens // groups + (group < virtual_tokens % groups) for group in range(groups)]


def text_ids(ids: Sequence[int]) -> list[int]:
    """The entries of a row that are tokens: what is left of it without the places."""
    return [entry for entry in ids if entry >= 0]


def placed(ids: Sequence[int], virtual_tokens: int, blank: Sequence[int] = ()) -> list[int]:
    """An encoded input with its virtual tokens numbered in order and its blank filled by the tokens ``blank``."""
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
            row.extend(-(next_virtual + place + 1) for place in range(count))
            next_virtual += count
    return row
