"""SIGTERM beside libraries that take it over: whoever handled it before does so again."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around a library that takes SIGTERM over as it starts: whoever handled it before does so again.

    Ray's handler ends the process with SystemExit; a signal that comes while it stands goes to the former handler too.
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
    """Let Python's handler of SIGTERM have it again, where a library took the signal from it behind its back."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def sigterm_kept_by_system() -> Iterator[None]:
    """As ``sigterm_kept``, in a thread that Python lets handle no signals: what the system did on the signal before, it
    does afterwards. Ray's C++ would print a stack and end the process."""
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, before)
