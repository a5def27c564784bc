"""Imports of large libraries, and the end of a program that made them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports that make hundreds of thousands of objects, which stay. Python would look for garbage among them
    again and again while they come, for a sixth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def unfreed() -> None:
    """What the program holds at its very end is left to the system. Python would look through hundreds of thousands of
    objects for garbage once more, for two seconds."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
