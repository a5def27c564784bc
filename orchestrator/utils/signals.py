"""Keep our SIGTERM handlers when libraries replace them."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM after a library replaced it while starting.

    Ray's handler ends the process with SystemExit. A signal that arrives while Ray's handler is
    installed is also passed to the former handler.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def sigterm_again() -> None:
    """Reinstall Python's SIGTERM handler after a library replaced it at the system level."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def sigterm_kept_by_system() -> Iterator[None]:
    """Restore the system's action for SIGTERM, like ``sigterm_kept`` but in any thread.

    Python lets only the main thread set handlers, so this uses the C API. Ray's C++ handler would
    print a stack trace and end the process.
    """
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, before)
