"""Two hundred searches that are refused, interrupted or lose their server; twenty in `test-long`.

ENDINGS_SEED draws other attempts. To repeat an attempt that went wrong, run
`python -m failure.endings --seed SEED --only NUMBER`.
"""

from __future__ import annotations

import os

import pytest
from failure.endings import SHARE, endings

SEED = int(os.environ.get("ENDINGS_SEED", "0"))
ALL = 200
A_SHARE = len(SHARE)  # includes every kind of ending


def wrong(first: int) -> list[str]:
    """Return the attempts of a share that went wrong."""
    ended = list(endings(A_SHARE, SEED, range(first, first + A_SHARE)))
    assert len(ended) == A_SHARE
    return [str(each) for each in ended if each.problems]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_endings_say_what_ended_them() -> None:
    """Searches end with the right exit code and message, within about a minute.

    No process and no running MLflow run remains.
    """
    found = wrong(0)
    assert not found, "\n".join(found)


@pytest.mark.failure
@pytest.mark.long
@pytest.mark.endings
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, ALL, A_SHARE))
def test_two_hundred_endings_say_what_ended_them(first: int) -> None:
    """All two hundred attempts end in the right way, each at another moment."""
    found = wrong(first)
    assert not found, "\n".join(found)
