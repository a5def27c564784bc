"""Signals become one interrupt, which is never raised inside a block that must complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from orchestrator.cluster.ray_threads import RayThread, alive, await_end
from orchestrator.utils.interrupts import Interrupts, nothing_to_interrupt, undisturbed, whole

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handle both signals as in a terminal; restore the handlers afterwards."""
    ignored = signal.getsignal(signal.SIGINT)  # if a shell runs the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, ignored)
    assert after == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_only_the_first_signal_interrupts(first: int, second: int) -> None:
    """A second Ctrl-C or SIGTERM does not stop the cleanup after the first."""
    tidied = []

    def command() -> None:
        try:
            send(first)
        finally:
            send(second)
            tidied.append(True)

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            command()
        assert interrupts.received == first and tidied


class SignalledDestructor:
    """An object in whose destructor a signal arrives."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


def destroy(target: object) -> None:
    """Drop the last reference, and wait for what happens then."""
    del target
    time.sleep(5)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_in_a_destructor_is_raised_after_it(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what a destructor raises; the interrupt arrives all the same, and once."""
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            destroy(SignalledDestructor(number))
        assert interrupts.received == number
        send(number)
        time.sleep(0.1)
    assert "Exception ignored" not in capsys.readouterr().err


def test_other_errors_in_a_destructor_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that is no interrupt reaches Python's own hook."""

    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken destructor")

    before, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__
    try:
        with Interrupts():
            Broken()
        assert sys.unraisablehook is sys.__unraisablehook__
    finally:
        sys.unraisablehook = before
    assert "broken destructor" in capsys.readouterr().err


def test_a_command_in_the_background_ignores_ctrl_c() -> None:
    """If a shell starts the command with SIGINT ignored, it stays ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            assert interrupts.received is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_block_that_is_not_to_be_disturbed_is_finished_first(number: int) -> None:
    """The interrupt is raised at the end of the outermost protected block."""
    steps: list[str] = []

    def work() -> None:
        with undisturbed():
            with undisturbed():
                send(number)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")

    with Interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["inner", "outer"]


def test_an_error_goes_before_an_interrupt_that_was_kept_back() -> None:
    """An error takes precedence over a delayed interrupt.

    The reason for a failure is reported even if a signal arrives during cleanup. If the error is
    handled, the interrupt is raised after all.
    """

    def refused() -> None:
        try:
            raise ValueError("refused")
        finally:
            with undisturbed():
                send(signal.SIGTERM)

    def goes_on() -> None:
        with undisturbed():
            pass

    with Interrupts():
        with pytest.raises(ValueError, match="refused"):
            refused()
        with pytest.raises(KeyboardInterrupt):
            goes_on()


@pytest.mark.parametrize("at", ["enter", "leave"])
def test_what_is_entered_whole_is_left_whole(at: str) -> None:
    """A signal during enter or exit of a context is raised only afterwards."""
    steps: list[str] = []

    def step(name: str) -> None:
        if name == at:
            send(signal.SIGINT)
        steps.append(name)

    @contextmanager
    def context() -> Iterator[str]:
        step("enter")
        try:
            yield "value"
        finally:
            step("leave")

    def work() -> None:
        with whole(context) as value:
            steps.append(value)

    with Interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert steps == (["enter", "leave"] if at == "enter" else ["enter", "value", "leave"])


def test_an_error_in_a_whole_context_reaches_it() -> None:
    """The context may swallow the error, as in a plain ``with``."""
    seen: list[BaseException] = []

    @contextmanager
    def context() -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(error)

    with Interrupts(), whole(context):
        raise ValueError("mine")
    assert str(seen[0]) == "mine"


def test_a_command_whose_result_is_there_is_not_interrupted() -> None:
    """A command with a result is not interrupted: it prints the result."""
    with Interrupts() as interrupts:
        with undisturbed():
            nothing_to_interrupt()
            send(signal.SIGTERM)
        send(signal.SIGINT)
        assert interrupts.received is None


class Waits(RayThread):
    """A thread that ends when its event is set."""

    def __init__(self) -> None:
        super().__init__("waits")
        self.over = threading.Event()

    def run(self) -> None:
        self.over.wait(60)


def test_threads_are_waited_for_no_longer_than_asked() -> None:
    """All threads share one time limit; a thread that never started is not waited for."""
    threads = [Waits(), Waits(), Waits()]
    for thread in threads[:2]:
        thread.start()
    started = time.monotonic()
    assert await_end(threads, 0.3) == threads[:2]
    assert 0.25 < time.monotonic() - started < 5
    threads[0].over.set()
    assert await_end(threads[:1], 30) == []
    assert alive(threads) == threads[1:2]
    threads[1].over.set()


STUCK = """
import subprocess, sys, threading
from orchestrator.cluster.ray_threads import RayThread, end_ray_process

class Stuck(RayThread):
    def run(self):
        threading.Event().wait()

Stuck("stuck").start()
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], \
stdout=subprocess.DEVNULL).pid)
end_ray_process(3)
"""


def test_a_stuck_thread_changes_neither_exit_code_nor_what_was_said() -> None:
    """The process exits with its code and full output, and its children end too."""
    ran = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 3
    assert "stuck in a call of Ray: stuck" in ran.stderr
    child = int(ran.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and lives(child):
        time.sleep(0.05)
    assert not lives(child)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
