"""Progress of a search in a notebook: one output that holds the last lines and a live table."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, Group, RenderableType
from rich.text import Text

from orchestrator.cli.progress import ConsoleProgress, View
from orchestrator.job.spec import JobSpec

Show = Callable[[str], Callable[[str], None]]
"""A function that shows HTML, and returns a function that replaces it."""
LINES = 8  # of stages and notes, above the table
WIDTH = 120  # in characters
PAUSE_S = 0.25  # between two updates of the output
STYLE = "white-space:pre;overflow-x:auto;line-height:1.3;font-family:monospace"
FRAME = f'<pre style="{STYLE}">{{code}}</pre>'


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this process."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def show_in_cell(html: str) -> Callable[[str], None]:
    """Show HTML below the running cell; return a function that replaces it."""
    from IPython.display import HTML, display

    handle = display(HTML(html), display_id=True)
    return lambda newer: handle.update(HTML(newer))


class NotebookProgress(ConsoleProgress):
    """The progress of the command line in a notebook's output, which is updated in place."""

    def __init__(self, job: JobSpec, show: Show = show_in_cell) -> None:
        super().__init__(job, Console(file=io.StringIO(), width=WIDTH))
        self._lines: list[str] = []
        self._shown: Group | None = None  # the newest table
        self._show = show
        self._replace: Callable[[str], None] | None = None
        self._updated = 0.0

    def _say(self, text: str) -> None:
        with self._lock:
            self._said = time.monotonic()
            self._lines.append(text)
            self._refresh(now=True)

    def _view(self) -> AbstractContextManager[View]:
        return self._tables()

    @contextmanager
    def _tables(self) -> Iterator[View]:
        """Show the newest table while the block runs, and the last one after it."""
        self.update(self._table())
        try:
            yield self
        finally:
            with self._lock:
                self._refresh(now=True)

    def update(self, renderable: Group, /) -> None:
        """Show a table, unless the last one was shown just before."""
        with self._lock:
            self._shown = renderable
            self._refresh()

    def _refresh(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._updated < PAUSE_S:
            return
        self._updated = time.monotonic()
        html = html_of(*map(Text, self._lines[-LINES:]), *([self._shown] if self._shown else []))
        if self._replace is None:
            self._replace = self._show(html)
        else:
            self._replace(html)


def html_of(*parts: RenderableType) -> str:
    """Render parts as HTML, in which their texts are escaped."""
    console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))
    return console.export_html(inline_styles=True, code_format=FRAME)
