"""SIGTERM, which schedulers, service managers and `timeout` send, as an interrupt: it ends a command as Ctrl-C does."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Sigterm:
    """Around a command: the first SIGTERM raises KeyboardInterrupt in it; afterwards the former handler is back.

    Later ones do nothing: `timeout` sends two, and the second would end the tidying up that the first began. It is no
    exception of our own, because Ray waits in C++ and hands on a plain KeyboardInterrupt whatever was raised.
    """

    def __init__(self) -> None:
        self.received = False
        self._over = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread may set or get signals
            self._before = signal.signal(signal.SIGTERM, self._interrupt) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def over(self) -> None:
        """The command has ended by itself and says how: from now on there is nothing to interrupt."""
        self._over = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.received and not self._over:
            self.received = True
            raise KeyboardInterrupt


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
