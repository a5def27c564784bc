"""``make pictures``: record the README's pictures from a real search.

docs/images/search.svg is the terminal of ``orchestrator run`` on the quickstart, and
docs/images/report.png the top of that search's report, for which chromium is needed.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyte
from browser import BROWSER, FLAGS
from rich.color import ColorParseError
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from orchestrator.cli.init import starter_file

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 116, 70
JOB = "quickstart.yaml"
STORES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "ORCHESTRATOR_HOME")
REPORT_SIZE = (1160, 900)
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 16px; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Run the search in a folder that is deleted afterwards, and write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / JOB).write_bytes(starter_file(JOB))
        screen = recorded(orchestrator("run", JOB), folder)
        picture = svg(screen_text(screen), f"orchestrator run {JOB}")
        (IMAGES / "search.svg").write_text(picture, encoding="utf-8")
        subprocess.run(
            orchestrator("report", "latest", "--out", "report.html"),
            cwd=folder,
            env=environment(),
            check=True,
        )
        photograph(folder / "report.html", IMAGES / "report.png", folder / "profile")


def orchestrator(*words: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *words]


def environment() -> dict[str, str]:
    """Return the environment without the user's stores, for a terminal of our size."""
    own = {name: value for name, value in os.environ.items() if name not in STORES}
    return own | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}


def recorded(argv: Sequence[str], folder: Path) -> pyte.Screen:
    """Run a command in a terminal of its own; return what its screen shows at the end.

    Raises CalledProcessError if the command fails.
    """
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    with subprocess.Popen(
        argv,
        cwd=folder,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        for output in outputs(ours):
            stream.feed(output)
    os.close(ours)
    if process.returncode:
        shown = "\n".join(screen.display)
        raise subprocess.CalledProcessError(process.returncode, argv, output=shown)
    return screen


def outputs(terminal: int) -> Iterator[bytes]:
    """Yield what the program writes, until it closes its end of the terminal."""
    while True:
        try:
            output = os.read(terminal, 65536)
        except OSError:  # EIO: no process has the terminal any more
            return
        if not output:
            return
        yield output


def screen_text(screen: pyte.Screen) -> Text:
    """Return the screen's text with its colours, without the blank lines at the end."""
    used = [number for number, line in enumerate(screen.display) if line.strip()]
    lines = []
    for number in range(max(used, default=-1) + 1):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[number][column]
            line.append(cell.data, style_of(cell))
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def style_of(cell: pyte.screens.Char) -> Style:
    """Return a cell's style. Colours are names, or six hexadecimal digits."""
    return Style(color=colour(cell.fg), bold=cell.bold, italic=cell.italics, reverse=cell.reverse)


def colour(name: str) -> str | None:
    """Return the name of a colour for rich, or None for the terminal's own."""
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    name = {"brown": "yellow"}.get(name, name).replace("bright", "bright_")
    try:
        Style.parse(name)
    except (ColorParseError, ValueError):
        return None
    return name


def svg(text: Text, title: str) -> str:
    """Draw a terminal with the text, as SVG that loads nothing."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    console.print(text, soft_wrap=True)
    return console.export_svg(title=title, code_format=SVG, theme=MONOKAI, unique_id="terminal")


def photograph(page: Path, picture: Path, profile: Path) -> None:
    """Save the top of a page as a picture, if there is a browser."""
    if not BROWSER:
        sys.stderr.write("no chromium, so docs/images/report.png stays as it is\n")
        return
    width, height = REPORT_SIZE
    flags = [flag for flag in FLAGS if not flag.startswith("--window-size")]
    subprocess.run(
        [BROWSER, *flags, f"--window-size={width},{height}", "--hide-scrollbars",
         f"--user-data-dir={profile}", f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)


if __name__ == "__main__":
    main()
