"""Atomic writes: a file or a folder is complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RANDOM = "?" * 8  # matches what mkdtemp appends to the name of a temporary folder


def write_whole(file: Path, data: bytes) -> None:
    """Write a file atomically: the new content is there completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with staging.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(file)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into; at the end it is renamed to ``folder``.

    After an error nothing is left of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def make_folder_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have ``fill`` write a folder, unless the folder exists by the time that it is our turn.

    Other processes that call this at the same time wait until the folder is complete.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return
        # Nobody else makes this folder now, so its temporary folders are those of killed processes.
        for abandoned in folder.parent.glob(f".{folder.name}-{RANDOM}"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with whole_folder(folder) as staging:
            fill(staging)
