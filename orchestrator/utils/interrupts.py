"""Handle Ctrl-C and SIGTERM as one interrupt that ends a command once and lets it clean up.

People press Ctrl-C again when nothing seems to happen, and ``timeout``, schedulers and service
managers send SIGTERM more than once. Only the first signal interrupts the command, and not before a
block under ``undisturbed`` is over. Libraries that replace our handler of SIGTERM, as Ray does,
are called under ``sigterm_kept``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

Value = TypeVar("Value")

AGAIN_S = 0.01  # how long a destructor has to end before an interrupt that it dropped is sent again

_current: list[Interrupts] = []


class Interrupts:
    """A context that raises KeyboardInterrupt once, on the first SIGINT or SIGTERM.

    Later signals are ignored. ``received`` is the number of the first signal. The exception is not
    a class of our own, because Ray waits in C++ and passes on a plain KeyboardInterrupt whatever
    was raised.

    Python drops an exception that is raised in a destructor or a callback of the garbage collector,
    where a signal may well arrive. Such an interrupt is raised again a moment later.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._over = False
        self._held = 0
        self._due = False
        self._before: dict[int, Any] = {}
        self._hook_before = sys.unraisablehook

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only this thread may set handlers
            self._take(signal.SIGTERM)
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in background jobs
                self._take(signal.SIGINT)
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
            _current.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in _current:
            sys.unraisablehook = self._hook_before
            _current.remove(self)

    def over(self) -> None:
        """Ignore signals from now on: the command has ended by itself and reports how."""
        self._over = True

    def hold(self) -> None:
        """Hold back the interrupt until ``release`` was called as often as ``hold``."""
        self._held += 1

    def release(self) -> None:
        """Raise the interrupt that was held back, unless an error is already propagating."""
        self._held -= 1
        if self._due and not self._held and not self._over and sys.exc_info()[0] is None:
            self._due = False
            raise KeyboardInterrupt

    def _take(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or self._over:
            return
        self.received = number
        if self._held:
            self._due = True
            return
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Replace ``sys.unraisablehook``: send a dropped interrupt again, without a traceback."""
        if self.received is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._hook_before(unraisable)
            return
        # The destructor has to end first, or it would drop the exception again.
        again = threading.Timer(AGAIN_S, self._send_again)
        again.daemon = True
        again.start()

    def _send_again(self) -> None:
        number, self.received = self.received, None
        if number is not None and not self._over:
            os.kill(os.getpid(), number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay an interrupt until the block has finished.

    An error of the block, or one that is being handled around it, takes precedence.
    """
    if not _current or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = _current[-1]
    interrupts.hold()
    try:
        yield
    finally:
        interrupts.release()


@contextmanager
def whole(make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
    """Make, enter and leave a context without being interrupted halfway.

    An interrupt that arrives meanwhile is raised afterwards.
    """
    entered = ExitStack()

    def leave(*error: Any) -> bool | None:
        with undisturbed():
            return entered.__exit__(*error)

    with ExitStack() as stack:
        stack.push(leave)
        with undisturbed():
            value = entered.enter_context(make())
        yield value


def nothing_to_interrupt() -> None:
    """Let the command end without interrupts: its result is there and the rest takes a moment."""
    if _current:
        _current[-1].over()


def ignore_interrupts() -> None:
    """Ignore further signals, so that they do not change the exit code of the ending process."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore our handler of SIGTERM after a library replaced it while starting.

    Ray's handler in Python ends the process with SystemExit, and leaves the MLflow runs open. A
    signal that arrives while it is installed is also passed to our handler. In other threads Ray
    installs none.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    try:
        yield
    except SystemExit:
        before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
