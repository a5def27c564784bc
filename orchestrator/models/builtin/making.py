"""The cache of built-in models, where each model is made once and stored whole or not at all.

This holds however many processes ask for a model at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

from orchestrator.utils.atomic import make_folder_once

Progress: TypeAlias = Callable[[int, int], None]  # (steps done, steps in all)


def cache_folder() -> Path:
    """Return $ORCHESTRATOR_CACHE, or prompt-orchestrator in the user's cache folder."""
    if configured := os.environ.get("ORCHESTRATOR_CACHE"):
        return Path(configured).expanduser().absolute()
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

    def fill(staging: Path) -> None:
        with nullcontext(progress) if progress else _shown_progress(title) as bar:
            make(staging, bar)

    folder = cache_folder() / name
    if not folder.is_dir():
        make_folder_once(folder, fill)
    return folder


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
