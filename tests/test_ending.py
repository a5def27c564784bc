"""A process ends with its exit code and its output, whatever its threads are doing."""

from __future__ import annotations

import os
import subprocess
import sys

BUSY = """
import threading
import torch
from orchestrator.utils.ending import end_process

def multiply():
    numbers = torch.ones(700, 700)
    while True:
        numbers = torch.mm(numbers, numbers).clamp(0, 1)

threading.Thread(target=multiply, daemon=True).start()
threading.Event().wait(0.5)
print("done")
{ending}
"""
ORDER = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from orchestrator.utils.ending import end_process

def slow():
    time.sleep(0.3)
    print("thread")

threading.Thread(target=slow).start()
ThreadPoolExecutor().submit(print, "pool").result()
atexit.register(print, "exit function")
sys.stdout.write("no newline at the end: ")
end_process(7)
"""
CYCLE = """
from orchestrator.utils.ending import end_process

class Held:
    def __init__(self):
        self.me = self
    def __del__(self):
        print("freed")

Held()
end_process(0)
"""


def ended(script: str) -> subprocess.CompletedProcess[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    argv = [sys.executable, "-c", script]
    return subprocess.run(argv, env=buffered, capture_output=True, text=True, timeout=120)


def test_a_thread_inside_torch_does_not_crash_the_process() -> None:
    """The exit code is the one given, where Python's own exit ends in an abort."""
    ours = ended(BUSY.format(ending="end_process(3)"))
    assert (ours.returncode, ours.stdout, ours.stderr) == (3, "done\n", "")
    pythons = ended(BUSY.format(ending="raise SystemExit(3)"))
    assert pythons.returncode < 0, "Python's own exit works now: drop utils/ending.py"


def test_threads_end_and_exit_functions_run() -> None:
    """Threads that are not daemons are waited for, then exit functions run, and all is written."""
    ran = ended(ORDER)
    expected = "pool\nno newline at the end: thread\nexit function\n"
    assert (ran.returncode, ran.stdout) == (7, expected), ran.stderr


def test_no_object_is_freed_at_the_end() -> None:
    """Python would look through all objects once more, which takes two seconds of a search."""
    ran = ended(CYCLE)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_a_reader_that_left_changes_nothing() -> None:
    """The exit code stays when nobody reads the output any more."""
    script = """
import os, sys
from orchestrator.utils.ending import end_process
read, write = os.pipe()
os.dup2(write, sys.stdout.fileno())
os.close(read)
os.close(write)
sys.stdout.write("nobody reads this")
end_process(5)
"""
    assert ended(script).returncode == 5
