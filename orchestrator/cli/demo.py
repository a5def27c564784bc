"""The quickstart from end to end, through the command line's own verbs: run, serve, query."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchestrator.cli.init import starter_file
from orchestrator.job.labels import label_key, label_text
from orchestrator.models.builtin import quickstart_rows
from orchestrator.serving.client import ask
from orchestrator.utils.documents import JsonObject

JOB = "quickstart.yaml"
START_S = 120.0


def main() -> int:
    """Run the demo in build/demo. Returns 0 when every step succeeded, otherwise 1."""
    started = time.monotonic()
    folder = Path("build/demo").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    document = _search(folder)
    name = document["model"]["name"]
    searched = time.monotonic()
    right = _serve_and_ask(folder, name)
    now = time.monotonic()
    _print("")
    for line in time_table(document, now - searched, now - started):
        _print(line)
    _print("")
    _print(f"Everything is in {folder}; look around with: cd {folder} && {_command('ui')}")
    return (
        0
        if _rising(document) and right
        else _fail("the figures above are not what the demo promises")
    )


def time_table(document: JsonObject, serving_s: float, total_s: float) -> list[str]:
    """Format where the demo's seconds went, as lines; the rows add up to ``total_s``."""
    seconds = document["seconds"]
    rows = {
        "making the language model, once": seconds["model"],
        "reading data, starting Ray": seconds["prepare"] + seconds["ray"],
        "starting the worker and Tune": seconds["workers"],
        f"{len(document['trials'])} trials": seconds["trials"],
        "test split, registry": seconds["test"] + seconds["registry"],
        "serving and asking": serving_s,
    }
    rows["starting and ending programs"] = total_s - sum(rows.values())
    width = max(map(len, rows))
    return [
        f"where the demo's {total_s:.0f} s went:",
        *(f"  {name:{width}} {spent:7.1f} s" for name, spent in rows.items()),
    ]


def _search(folder: Path) -> JsonObject:
    """Run the search, and return its result document.

    Prints the accuracy on the held-out test rows: without a prompt, with the written instruction
    and with the tuned prompt.
    """
    (folder / JOB).write_bytes(starter_file(JOB))
    _print(f"$ {_command('run', JOB)}")
    done = subprocess.run(
        [*_argv("run", JOB), "--json"],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        sys.exit(_fail(f"the search ended with exit code {done.returncode}"))
    document: JsonObject = json.loads(done.stdout)
    rows = len(quickstart_rows()["test"])
    _print("")
    _print(f"accuracy on {rows} held-out rows:")
    for label, value in zip(
        ("without a prompt", "with the written instruction", "with the tuned prompt"),
        _accuracies(document),
        strict=True,
    ):
        _print(f"  {label:30} {value:.3f}")
    model = document["model"]
    _print(f"registered: {model['name']} version {model['version']}, alias {model['alias']}")
    return document


def _accuracies(document: JsonObject) -> tuple[float, float, float]:
    baselines, best = document["baselines"], document["best"]["metrics"]
    return (
        baselines["zero_shot"]["test"]["accuracy"],
        baselines["instruction"]["test"]["accuracy"],
        best["test"]["accuracy"],
    )


def _rising(document: JsonObject) -> bool:
    bare, instructed, tuned = _accuracies(document)
    return bare < instructed < tuned


def _serve_and_ask(folder: Path, name: str) -> bool:
    """Serve the best prompt and query one held-out text of each label.

    Returns true when all answers are right.
    """
    port = _free_port()
    _print("")
    _print(f"$ {_command('serve', name, '--port', port)} &")
    right = True
    with _server(folder, name, port) as url:
        for label, text in sorted(_a_text_of_each_label().items()):
            _print(f"$ {_command('query', name, text, '--url', url)}")
            answer = ask(url, name, text)
            _print(f"  {answer.text}   [the row says {label}]")
            right = right and label_key(answer.document["data"][0]["label"]) == label_key(label)
    return right


def _a_text_of_each_label() -> dict[str, str]:
    found: dict[str, str] = {}
    for row in quickstart_rows()["test"]:
        found.setdefault(label_text(row["label"]), str(row["text"]))
    return found


@contextmanager
def _server(folder: Path, name: str, port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    log = folder / "serve.log"
    argv = _argv("serve", name, "--port", port)
    options: dict[str, Any] = {"cwd": folder, "env": _environment(), "preexec_fn": _heed_interrupts}
    with log.open("w") as stderr, subprocess.Popen(argv, stderr=stderr, **options) as process:
        try:
            _await(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _heed_interrupts() -> None:
    """Restore the default handling of SIGINT in the server's process.

    A script that runs in the background ignores SIGINT. The server would inherit that, and an
    interrupt could not end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit(_fail(f"the server did not start: {log.read_text().strip()}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _argv(*words: Any) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, words)]


def _command(*words: Any) -> str:
    return shlex.join(["orchestrator", *map(str, words)])


def _environment() -> dict[str, str]:
    """Return the environment without variables that name a store, a cluster, a home or API keys.

    The demo therefore stays in its own folder.
    """
    mine = (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_REGISTRY_URI",
        "RAY_ADDRESS",
        "ORCHESTRATOR_HOME",
        "ORCHESTRATOR_API_KEYS",
    )
    return {name: value for name, value in os.environ.items() if name not in mine}


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _fail(text: str) -> int:
    sys.stderr.write(f"demo failed: {text}\n")
    return 1
