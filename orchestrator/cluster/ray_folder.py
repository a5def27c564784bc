"""The folder in which a local Ray keeps its session.

It contains sockets, and the system limits the length of their paths.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from orchestrator.errors import BadInput

SOCKET_BYTES = 107
"""The longest path in bytes that Linux allows for a socket."""
SESSION = "/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""The longest path that Ray appends to its folder."""
LONGEST = SOCKET_BYTES - len(SESSION)
READ_BY_RAY = re.compile(r"[A-Za-z0-9 /._+=,:@~#?%-]*")
"""The characters that work in the folder's path.

Ray's processes fail to start in a folder with quotes or with letters beyond ASCII.
"""
FALLBACK = Path("/tmp")


def ray_temp_dir(fallback: Path = FALLBACK) -> str | None:
    """Return the folder for Ray's sessions where Ray can't use the temporary folder.

    Returns None where it can. Raises BadInput when the fallback can't be written either.
    """
    if not (problem := _problem()):
        return None
    if not os.access(fallback, os.W_OK | os.X_OK):
        raise BadInput(
            f"{problem}, and {fallback} can't be written instead",
            f"set RAY_TMPDIR to a folder whose path has at most {LONGEST} bytes",
        )
    return str(fallback / "ray")


def ray_temp_note() -> str:
    """Describe where Ray keeps its session; empty if that is the temporary folder."""
    problem = _problem()
    return f"{problem}; Ray's sockets are in {FALLBACK / 'ray'}" if problem else ""


def _problem() -> str:
    """Name the reason that Ray can't use the temporary folder; empty if it can."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length > LONGEST:
        return f"{variable} {folder} is too long for sockets ({length} bytes, at most {LONGEST})"
    if not READ_BY_RAY.fullmatch(folder):
        return f"{variable} {folder!r} has characters that Ray can't read"
    return ""
