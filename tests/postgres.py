"""A real PostgreSQL for the tests: a temporary cluster on a free loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

DEBIAN = "/usr/lib/postgresql"
# Losing rows in a crash is fine here, so nothing waits for the disk.
SETTINGS = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=300"]


@dataclass(frozen=True)
class Cluster:
    """A running PostgreSQL."""

    port: int
    programs: Path

    def database(self, name: str) -> str:
        """Create an empty database and return its address."""
        program = [
            self.programs / "createdb",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "tests",
            name,
        ]
        subprocess.run(program, check=True, capture_output=True, timeout=60)
        return f"postgresql+psycopg://tests@127.0.0.1:{self.port}/{name}"


def programs() -> Path | None:
    """Return the folder of initdb and postgres; Debian keeps it off the PATH."""
    found = sorted(
        Path(DEBIAN).glob("*/bin/initdb"), key=lambda file: int(file.parts[-3].partition(".")[0])
    )
    file = str(found[-1]) if found else shutil.which("initdb")
    return Path(file).resolve().parent if file else None


def why_no_postgres() -> str:
    """Return why PostgreSQL is not available here, or ""."""
    if programs() is None:
        return "no PostgreSQL here; on Debian: apt-get install postgresql"
    if find_spec("psycopg") is None:
        return "no psycopg here; pip install 'psycopg[binary]'"
    return (
        ""
        if os.geteuid() or _unprivileged()
        else "PostgreSQL refuses to run as root, and there is no other user"
    )


def _unprivileged() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), "")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Run a cluster until the block ends.

    It accepts connections from everybody on this machine as user ``tests``.
    """
    found = programs()
    assert found is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = _unprivileged() if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    data = folder / "data"

    def control(*arguments: str | Path) -> None:
        subprocess.run(
            arguments, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120
        )

    options = [
        f"-p {port}",
        "-h 127.0.0.1",
        f"-k {folder}",
        *(f"-c {setting}" for setting in SETTINGS),
    ]
    try:
        control(
            found / "initdb", "-D", data, "-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8"
        )
        control(
            found / "pg_ctl",
            "-D",
            data,
            "-w",
            "-l",
            folder / "log",
            "-o",
            " ".join(options),
            "start",
        )
        try:
            yield Cluster(port, found)
        finally:
            control(found / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
