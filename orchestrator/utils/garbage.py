"""Python's garbage collector, kept from searching many objects of which none is garbage.

Checked on CPython 3.11. docs/workarounds.md has the gains.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection while a block makes hundreds of thousands of objects that stay.

    That is an import of large libraries, or reading many rows. Python would search these objects
    for garbage again and again, which takes a sixth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
