"""The garbage collector pauses during large imports and skips their objects at exit."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from orchestrator.utils.garbage import uncollected

ENDING = """
import gc
from orchestrator.utils.garbage import unfreed

class Held:
    def __init__(self, when):
        self.when, self.me = when, self
    def __del__(self):
        print(self.when)

unfreed()
Held("while it runs")
gc.collect()
Held("at its end")
"""


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
    """Garbage is collected as usual while a program runs, but not at its exit."""
    ran = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "while it runs\n"), ran.stderr
