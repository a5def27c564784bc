"""SIGTERM as an interrupt, and libraries that replace its handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from orchestrator.cli import entry
from orchestrator.errors import BadInput
from orchestrator.utils.interrupts import Interrupts, sigterm_kept


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    """Restore the handler of SIGTERM, which each test must leave as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield before
    found = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert found == before


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def library(terminated: bool = False) -> None:
    """Replace SIGTERM's handler as ray.init does; ``terminated`` sends a signal meanwhile."""
    with sigterm_kept():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if terminated:
            terminate()


def test_the_first_interrupts_and_the_second_does_nothing() -> None:
    """KeyboardInterrupt is raised once; the cleanup after it is not disturbed."""
    sigterm, tidied = Interrupts(), []

    def command() -> None:
        try:
            terminate()
        finally:
            terminate()
            tidied.append(True)

    assert not sigterm.received
    with pytest.raises(KeyboardInterrupt), sigterm:
        command()
    assert sigterm.received == signal.SIGTERM and tidied


@pytest.mark.parametrize(
    "error",
    [BadInput("no such job", "ls"), ValueError("unforeseen")],
    ids=lambda it: type(it).__name__,
)
def test_a_command_that_failed_says_so_to_its_end(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the output of an error message is ignored."""
    said: list[str] = []

    def say(text: str) -> None:
        terminate()
        said.append(text)

    def verb() -> None:
        raise error

    monkeypatch.setattr(entry, "say", say)
    assert entry._guarded(verb) == getattr(error, "exit_code", 1)
    assert len(said) == 1 and str(error.args[0]) in said[0]


def test_other_threads_leave_signals_alone() -> None:
    """Only the main thread may handle signals; in other threads both contexts do nothing."""
    ended: list[int | None] = []

    def work() -> None:
        with Interrupts() as sigterm, sigterm_kept():
            ended.append(sigterm.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [None]


def test_a_library_gives_back_what_it_took_over() -> None:
    """The library's handler is removed after its start.

    It stays if nothing had handled the signal before.
    """
    with Interrupts():
        mine = signal.getsignal(signal.SIGTERM)
        library()
        assert signal.getsignal(signal.SIGTERM) == mine
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    library()
    assert callable(signal.signal(signal.SIGTERM, before))


def test_a_signal_during_the_librarys_start_interrupts() -> None:
    """The library's SystemExit on a signal becomes the intended interrupt."""
    with pytest.raises(KeyboardInterrupt), Interrupts() as sigterm:
        library(terminated=True)
    assert sigterm.received


SHUT_DOWN = """
import ctypes, gc, os, signal, sys
import ray
from orchestrator.cluster.ray_internals.core import no_signal_handlers
from orchestrator.cluster.session import leave_ray
from orchestrator.utils.interrupts import Interrupts, sigterm_kept

action = ctypes.pythonapi.PyOS_getsig
action.restype = ctypes.c_void_p

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

end = ray._private.node.Node.kill_all_processes

def told_again(self, *args, **options):
    print("collects", gc.isenabled())
    terminate()
    end(self, *args, **options)

sigterm = Interrupts()
try:
    with sigterm:
        before = action(signal.SIGTERM)
        with sigterm_kept(), no_signal_handlers():
            ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
            print("kept", action(signal.SIGTERM) == before)
        ray._private.node.Node.kill_all_processes = told_again
        try:
            terminate()
        finally:
            leave_ray()
            print("kept", action(signal.SIGTERM) == before)
            terminate()
except KeyboardInterrupt:
    print("said", ray.is_initialized(), flush=True)
os._exit(0)  # without what Ray does at a program's end
"""


@pytest.mark.ray  # its own
def test_a_second_one_does_not_cut_ray_s_end_short() -> None:
    """A second signal is ignored while Ray's processes end and after that.

    Ray's C++ code leaves the system's action for SIGTERM alone, both as it starts and as it shuts
    down. Meanwhile no garbage is collected, in which there might be references that call Ray.
    """
    ran = subprocess.run(
        [sys.executable, "-c", SHUT_DOWN], capture_output=True, text=True, timeout=120
    )
    said = "kept True\ncollects False\nkept True\nsaid False\n"
    assert (ran.returncode, ran.stdout) == (0, said), ran.stderr
