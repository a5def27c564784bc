"""Searches in an object store: consistent copies, one runner at a time, helpful errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import object_store, why_no_object_store
from ray_state import eventually

from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.search.state import object_store_copy as remote
from orchestrator.search.state.events import Reported, Started
from orchestrator.search.state.folder import SearchFolder, check_home, searches_folder
from orchestrator.search.state.history import History
from orchestrator.search.state.journal import Journal, read_history
from orchestrator.search.state.object_store_copy import RemoteHome
from orchestrator.search.state.saved import find_search
from tests.search.test_journal import SPEC, checkpoint, report

WRITER = """
import itertools, sys
from orchestrator.search import remote
remote.BEAT_S = 0.01
from tests.search.test_remote import folder_named, write_round
folder = folder_named("search")
with folder.locked():
    (folder.path / "job.yaml").write_text("name: x")
    (folder.path / "search.json").write_text("{}")
    journal = None
    for number in itertools.count(1):
        journal = write_round(folder, number, journal)
        print(number, flush=True)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    if reason := why_no_object_store():
        pytest.skip(reason)
    with object_store("team") as environment:
        yield {name: value for name, value in environment.items() if name.startswith("AWS_")} | {
            "AWS_ENDPOINT_URL": environment["MLFLOW_S3_ENDPOINT_URL"]
        }


@pytest.fixture(params=["file", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point ORCHESTRATOR_HOME to an empty store, and shorten heartbeats and the silence limit."""
    if request.param == "s3":
        for name, value in request.getfixturevalue("bucket").items():
            monkeypatch.setenv(name, value)
        url = f"s3://team/{tmp_path.name}"
    else:
        url = (tmp_path / "store").as_uri()
    monkeypatch.setenv("ORCHESTRATOR_HOME", url)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(remote, "BEAT_S", 0.1)
    monkeypatch.setattr(remote, "SILENCE_S", 3.0)
    return url


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as another machine from here on: without the first machine's cache."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "elsewhere"))


def folder_named(name: str) -> SearchFolder:
    return SearchFolder(searches_folder() / name)


def write_round(folder: SearchFolder, number: int, journal: Journal | None = None) -> Journal:
    """Write three trials' reports at step ``number``, which replace the earlier ones."""
    if journal is None:
        journal = Journal(folder, History())
        journal.append([Started(f"t{trial}", SPEC) for trial in range(3)], 0.0)
    journal.append([Reported(report(f"t{trial}", number)) for trial in range(3)], float(number))
    return journal


def contents(folder: SearchFolder) -> dict[str, bytes]:
    files = [it for it in folder.path.rglob("*") if it.is_file() and it.name != "lock"]
    return {it.relative_to(folder.path).as_posix(): it.read_bytes() for it in files}


def test_what_a_search_leaves_is_there_elsewhere(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine gets the search's files, except node-local ones and those already removed.

    It finds the search by name and as ``latest``.
    """
    folder = folder_named("search-1")
    with folder.locked():
        (folder.path / "inputs").mkdir()
        (folder.path / "inputs" / "rows.jsonl").write_text("{}")
        (folder.path / "job.yaml").write_text("name: x")
        (folder.path / "search.json").write_text("{}")
        (folder.path / "ray").mkdir()
        (folder.path / "ray" / "log").write_text("x")
        journal = write_round(folder, 1)
        eventually(lambda: RemoteHome(home).read(folder.path, "journal.jsonl"))
        write_round(folder, 2, journal)
    shutil.rmtree(folder.path / "ray")
    kept = contents(folder)
    assert set(kept) == {
        "inputs/rows.jsonl", "job.yaml", "search.json", "journal.jsonl",
        *(f"checkpoints/t{trial}-2.safetensors" for trial in range(3)),
    }  # fmt: skip
    elsewhere(tmp_path, monkeypatch)
    assert not folder_named("search-1").path.exists()
    for wanted in ("latest", "search"):
        found = find_search(wanted)
        assert found.path != folder.path and contents(found) == kept
    with found.locked():  # the lock has been released
        pass


def test_a_copy_is_a_state_whenever_its_writer_dies(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is consistent when SIGKILL ends its writer between any two requests.

    Every trial that the copied journal knows has its checkpoint beside it.
    """
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}tests"}
    command = [sys.executable, "-c", WRITER]
    root = Path(__file__).parents[2]
    writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=root)
    assert writer.stdout is not None

    def is_copied() -> bool:
        """Return whether the search exists yet; its description, search.json, is copied last."""
        files = [
            RemoteHome(home).read(folder_named("search").path, name)
            for name in ("search.json", "journal.jsonl")
        ]
        return None not in files and b'"reported"' in files[1]

    try:
        assert eventually(is_copied)
        written = [int(next(writer.stdout)) for _ in range(40)]
    finally:
        writer.send_signal(signal.SIGKILL)
        written += [int(line) for line in writer.stdout.read().split()]
        writer.wait()
    elsewhere(tmp_path, monkeypatch)
    folder = find_search("latest")
    began = time.monotonic()
    with folder.locked():  # the dead runner's lock expires after its silence
        assert time.monotonic() - began >= remote.SILENCE_S
        history = read_history(folder)
    assert history.lost == {} and len(history.checkpoints) == 3
    step = history.steps()["t0"]
    assert 1 <= step <= written[-1] + 1
    assert history.checkpoints["t0"] == checkpoint(step)


def test_of_two_runners_one_is_refused(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder_named("x").locked():
        elsewhere(tmp_path, monkeypatch)
        with pytest.raises(BadInput, match=f"still being run by process {os.getpid()} on "):
            run_nothing()


def test_who_was_taken_over_hears_of_it(home: str, tmp_path: Path) -> None:
    """A runner that loses its lock to another one raises an error and leaves the copy alone.

    This happens when it could not reach the store for long enough.
    """
    folder, found = folder_named("search"), RemoteHome(home)
    other = json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}).encode()

    def run() -> None:
        with folder.locked():
            # Written repeatedly, as the other runner does: the first write may be overwritten by
            # ours.
            eventually(lambda: found.write(folder.path, remote.LOCK, other) or not copying(0.3))
            write_round(folder, 1)

    with pytest.raises(JobFailed, match="process 7 on elsewhere took over search search"):
        run()
    assert found.read(folder.path, remote.JOURNAL) is None
    assert found.read(folder.path, remote.LOCK) == other


def copying(seconds: float) -> bool:
    """Return whether the copying thread is still alive after ``seconds``."""
    time.sleep(seconds)
    return any(it.name == "search-copy" for it in threading.enumerate())


def test_what_is_ahead_here_stays(home: str) -> None:
    """A driver that died between two copies goes on from its newer local state."""
    folder = folder_named("search")
    with folder.locked():
        (folder.path / "search.json").write_text("{}")
        journal = write_round(folder, 1)
    write_round(folder, 2, journal)
    folder.fetch()
    assert read_history(folder).steps()["t0"] == 2
    with folder.locked():
        pass
    shutil.rmtree(folder.path)
    folder.fetch()
    assert read_history(folder).steps()["t0"] == 2 and read_history(folder).lost == {}


def test_a_store_that_is_away(
    bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable store ends the command before a search.

    At the end of a search, the error says how to complete the copy.
    """
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("ORCHESTRATOR_HOME", "s3://nobodys/searches")
    for use in (check_home, run_nothing):
        with pytest.raises(
            Unreachable, match=r"s3://nobodys/searches.*ORCHESTRATOR_HOME.*"
        ) as lacking:
            use()
    assert "AWS_ENDPOINT_URL" in lacking.value.hint
    monkeypatch.setenv("ORCHESTRATOR_HOME", f"s3://team/{tmp_path.name}")
    monkeypatch.setattr(remote, "LAST_S", 0.1)
    monkeypatch.setattr(remote, "BEAT_S", 0.1)

    def run_on() -> None:
        with folder_named("x").locked():
            monkeypatch.setattr(RemoteHome, "write", refuse)

    with pytest.raises(Unreachable) as away:
        run_on()
    assert "orchestrator resume x on this machine completes the copy" in away.value.hint


def run_nothing() -> None:
    with folder_named("x").locked():
        pass


def refuse(*_: object) -> None:
    raise OSError("connection refused")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/searches", "no store of kind 'ftp' is known"),
        ("s3://me:secret@bucket/searches", "holds a key"),
        ("s3://", "names no bucket"),
    ],
)
def test_addresses_that_are_none(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", url)
    with pytest.raises(BadInput, match=message) as found:
        find_search("latest")
    assert "secret" not in str(found.value).replace("AWS_SECRET_ACCESS_KEY", "")
