"""Faster imports of large libraries, and a faster exit of programs that imported them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection during imports that make hundreds of thousands of objects.

    These objects stay, so Python would search them for garbage again and again during the import,
    which takes a sixth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def unfreed() -> None:
    """Skip the garbage collection at the program's exit, and leave its memory to the system.

    Python would search hundreds of thousands of objects for garbage once more, which takes two
    seconds.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
