"""The end of a process, without the end of its interpreter.

Checked on CPython 3.11. docs/workarounds.md has the reasons.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, as the processes of ``multiprocessing`` end.

    Threads that are not daemons end by themselves and exit functions run, as in any Python. The
    interpreter is not torn down: its daemon threads would be ended inside the C++ code of libraries
    such as torch and Ray, which crashes the process with exit code -6.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    flush_output()
    os._exit(code)


def flush_output() -> None:
    """Write what was printed. A reader that has left is no error of ours."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
