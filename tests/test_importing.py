"""Garbage collection pauses while large libraries are imported, and skips what they made at a program's end."""

from __future__ import annotations

import gc

import pytest

from orchestrator.importing import uncollected, unfreed


def test_collection_pauses_and_goes_on() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(ModuleNotFoundError), uncollected():
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_who_collects_nothing_goes_on_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_at_the_end_nothing_is_looked_through() -> None:
    """All objects that there are count as permanent."""
    try:
        unfreed()
        assert gc.get_freeze_count() > 10_000 and gc.get_count()[2] == 0
    finally:
        gc.unfreeze()
