"""Open pages in a headless browser; return their text after scripts ran and a screenshot."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1500,900",
    "--timeout=40000", "--virtual-time-budget=30000",  # the pages fetch most of what they show
]  # fmt: skip
LIMIT_S = 90.0  # only a hang takes this long
LOADS = 3

needs_browser = pytest.mark.skipif(
    not BROWSER, reason="no chromium here; on Debian: apt-get install chromium"
)


@contextmanager
def mlflow_pages(tracking_uri: str) -> Iterator[str]:
    """Serve a store with ``orchestrator ui`` in a process of its own; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "orchestrator", "ui", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri}
    process = subprocess.Popen(
        argv,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert _answers(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the server's own session, with its workers
        process.wait()


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Return whether the server answers before the time limit."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return True
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    return False


def text_of(address: str, picture: str, profile: Path, wanted: Sequence[str] = ()) -> str:
    """Return a page's text after its scripts ran; save a screenshot in build/screenshots.

    On a busy machine the browser's own time limit may end before the page has fetched the
    ``wanted`` words. The page is then opened again, up to LOADS times.
    """
    for _ in range(LOADS):
        text = read_page(address, picture, profile)[0]
        if all(word in text for word in wanted):
            break
    return text


def check_pages(shown: dict[str, tuple[str, list[str]]], profile: Path) -> None:
    """Check that every page contains its expected words; ``shown`` is keyed by picture name."""
    for picture, (address, wanted) in shown.items():
        text = text_of(address, picture, profile, wanted)
        assert [it for it in wanted if it not in text] == [], picture


def read_page(
    address: str, picture: str, profile: Path, more: Sequence[str] = ()
) -> tuple[str, str]:
    """Return the page's text and its title."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"{picture}.png"
    file.unlink(missing_ok=True)
    argv = [
        BROWSER,
        *FLAGS,
        *more,
        f"--user-data-dir={profile}",
        f"--screenshot={file}",
        "--dump-dom",
        address,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert file.read_bytes().startswith(b"\x89PNG")
    words = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    return " ".join(html.unescape(words).split()), title[1] if title else ""
