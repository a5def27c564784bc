"""The cache of built-in models, where each model is made once and stored whole or not at all.

This holds however many processes ask for a model at the same time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]  # (steps done, steps in all)


def cache_folder() -> Path:
    """Return $ORCHESTRATOR_CACHE, or prompt-orchestrator in the user's cache folder."""
    if own := os.environ.get("ORCHESTRATOR_CACHE"):
        return Path(own).expanduser().absolute()
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
        / "prompt-orchestrator"
    )


def made_once(
    name: str, make: Callable[[Path, Progress], None], title: str, progress: Progress | None = None
) -> Path:
    """Return the folder ``name`` of the cache, and have ``make`` fill it if it does not exist yet.

    Other processes that ask at the same time wait until the folder is made. ``progress`` is called
    with (steps done, steps in all). Without ``progress``, standard error shows the progress under
    ``title``.
    """
    from filelock import FileLock

    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _make(folder, make, title, progress)
    return folder


def _make(
    folder: Path, make: Callable[[Path, Progress], None], title: str, progress: Progress | None
) -> None:
    """Fill a temporary folder beside the final one, then rename it when it is complete.

    The caller holds the folder's lock, so other temporary folders of its name are those of killed
    processes. They are removed.
    """
    for abandoned in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if progress is not None:
            make(staging, progress)
        else:
            with _shown_progress(title) as shown:
                make(staging, shown)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _shown_progress(title: str) -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, otherwise a line at every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: _line(console, title, done, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(console: object, title: str, done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:
        console.print(f"{title}: {100 * done // total} %", highlight=False)  # type: ignore[attr-defined]
