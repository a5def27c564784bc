"""Copies of searches in an object store, from which other machines can resume them.

A copy always is a state that the folder had: checkpoints are sent before the journal that refers to
them, and files that the journal no longer needs are removed after it. The copy is at most some
seconds behind. A search that is resumed from it trains the missing part again, with the same
result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.models.builtin.making import cache_folder
from orchestrator.utils.atomic import write_whole
from orchestrator.utils.object_store import check_address, is_address
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

log = logging.getLogger(__name__)

SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
BEAT_S = 5.0
SILENCE_S = 3 * BEAT_S  # a process that has not changed its lock for this long is dead
LAST_S = 60.0  # time to complete the copy when a search ends
LOCK = "lock.json"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
# Each of these files implies that the files it refers to are there: they go last, in this order.
MARKS = (JOURNAL, "search.json", "result.json")
OF_THE_NODE = ("ray", "lock", "processes.json")  # entries that are of no use on another machine
TRIES = 20


class RemoteHome:
    """Searches below an address such as ``s3://bucket/team``, and the local folder for them.

    Keys and endpoint come from the environment, as with AWS's own tools. Raises BadInput for
    something that is not an address, and Unreachable when the store does not answer or refuses.
    """

    def __init__(self, url: str) -> None:
        check_address(url, "ORCHESTRATOR_HOME")
        self.url = url.rstrip("/")
        self._opened: tuple[FileSystem, str] | None = None

    @property
    def local(self) -> Path:
        """The folder on this machine that stands for the store."""
        return cache_folder() / "homes" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Check that the store accepts files and removes them."""
        place, name = Path(".check"), secrets.token_hex(8)
        with self.translating():
            self.write(place, name, b"")
            self.remove(place, name)

    def ids(self) -> list[str]:
        """Return the searches that can be resumed, oldest first."""
        with self.translating():
            files = [it for it in self._files("searches") if it.path.endswith("/search.json")]
        return [
            Path(it.path).parent.name for it in sorted(files, key=lambda it: (it.mtime, it.path))
        ]

    def fetch(self, folder: Path) -> None:
        """Update a search's folder from the store.

        The folder stays as it is when it is ahead of the store, or when the store lacks the search.
        """
        with self.translating():
            found = {
                self._below(it.path, folder): it.size
                for it in self._files(f"searches/{folder.name}")
            }
            found.pop(LOCK, None)
            if not found or self._is_ahead(folder, found):
                return
            for name in sorted(found, key=_order):
                file = folder / name
                if _order(name)[0] == 0 and file.is_file() and file.stat().st_size == found[name]:
                    continue  # a checkpoint never changes
                write_whole(file, self.read(folder, name) or b"")

    def _is_ahead(self, folder: Path, found: dict[str, int]) -> bool:
        journal, there = folder / JOURNAL, self.read(folder, JOURNAL) or b""
        return (
            (folder / "search.json").is_file()
            and journal.is_file()
            and journal.read_bytes().startswith(there)
            and ("result.json" not in found or (folder / "result.json").is_file())
        )

    def read(self, folder: Path, name: str) -> bytes | None:
        """Read a file of a search; None when it does not exist. Raises OSError."""
        store, root = self._open()
        try:
            with store.open_input_stream(f"{root}/searches/{folder.name}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, folder: Path, name: str, data: bytes) -> None:
        """Write a file of a search, completely or not at all. Raises OSError."""
        store, root = self._open()
        path = f"{root}/searches/{folder.name}/{name}"
        # An object store shows a file once it is complete, and needs no folder.
        if store.type_name == "local":
            write_whole(Path(path), data)
            return
        with store.open_output_stream(path) as stream:
            stream.write(data)

    def remove(self, folder: Path, name: str) -> None:
        """Remove a file of a search, if it exists. Raises OSError."""
        store, root = self._open()
        with suppress(FileNotFoundError):
            store.delete_file(f"{root}/searches/{folder.name}/{name}")

    @contextmanager
    def translating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.unreachable(error) from error

    def unreachable(self, error: OSError) -> Unreachable:
        reason = first_line(error)
        return Unreachable(
            f"{self.url}, where searches are kept (ORCHESTRATOR_HOME), can't be used: {reason}",
            f"look at the address and at {', '.join(SETTINGS)}",
        )

    def _files(self, below: str) -> list[FileInfo]:
        from pyarrow.fs import FileSelector, FileType

        store, root = self._open()
        found = store.get_file_info(
            FileSelector(f"{root}/{below}", recursive=True, allow_not_found=True)
        )
        return [it for it in found if it.type == FileType.File and not it.base_name.startswith(".")]

    @staticmethod
    def _below(path: str, folder: Path) -> str:
        return path.split(f"/searches/{folder.name}/", 1)[1]

    def _open(self) -> tuple[FileSystem, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem
            from pyarrow.lib import ArrowInvalid

            try:
                store, root = FileSystem.from_uri(self.url)
            except ArrowInvalid as error:
                raise BadInput(
                    f"ORCHESTRATOR_HOME is {self.url!r}: {error}",
                    "s3://BUCKET/FOLDER, for instance",
                ) from None
            self._opened = store, root.rstrip("/")
        return self._opened


def remote_home() -> RemoteHome | None:
    """Return the store that ORCHESTRATOR_HOME names; None when it names a folder."""
    url = os.environ.get("ORCHESTRATOR_HOME", "")
    return RemoteHome(url) if is_address(url) else None


@contextmanager
def followed(folder: Path) -> Iterator[None]:
    """Lock a search in the store, and keep its copy there up to date during the block.

    Does nothing where searches are kept in a folder. Raises BadInput when another process runs the
    search, Unreachable when the copy could not be completed, and JobFailed when another process has
    taken over meanwhile.
    """
    home = remote_home()
    if home is None:
        yield
        return
    lock = _Lock(home, folder)
    with home.translating():
        lock.take()
    home.fetch(folder)
    copy = _Copy(home, folder, lock)
    copy.start()
    try:
        yield
    except BaseException:
        with suppress(Unreachable, JobFailed):
            copy.finish()
        raise
    copy.finish()


class _Lock:
    """A lock file that its holder changes every few seconds.

    Other processes watch whether it changes, so no common clock is needed.
    """

    def __init__(self, home: RemoteHome, folder: Path) -> None:
        self._home = home
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        self._beats = 0

    def take(self) -> None:
        if found := self._home.read(self._folder, LOCK):
            time.sleep(SILENCE_S)
            now = self._home.read(self._folder, LOCK)
            if now and now != found:
                self._refuse(now)
        self._write()
        time.sleep(0.5)  # processes that wrote at the same moment now all see the last write
        if not self._is_mine(now := self._home.read(self._folder, LOCK)):
            self._refuse(now or b"")

    def beat(self) -> None:
        """Change the lock to show that its holder is alive.

        Raises JobFailed when another process holds it.
        """
        if not self._is_mine(found := self._home.read(self._folder, LOCK)):
            raise JobFailed(
                f"{_holder(found)} took over search {self._folder.name} while {self._home.url} "
                "was out of reach",
                "its results are that process's now",
            )
        self._write()

    def release(self) -> None:
        self._home.remove(self._folder, LOCK)

    def _write(self) -> None:
        self._beats += 1
        self._home.write(
            self._folder, LOCK, json.dumps({**self._mine, "beat": self._beats}).encode()
        )

    def _is_mine(self, found: bytes | None) -> bool:
        return not found or self._token in found.decode(errors="replace")

    def _refuse(self, found: bytes) -> None:
        raise BadInput(
            f"search {self._folder.name} is still being run by {_holder(found)}",
            "wait for its end, or interrupt it first",
        )


def _holder(found: bytes | None) -> str:
    try:
        document = json.loads(found or b"")
        return f"process {document['pid']} on {document['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


class _Copy(threading.Thread):
    """A thread that sends the changes of a search's folder to the store until ``finish``."""

    def __init__(self, home: RemoteHome, folder: Path, lock: _Lock) -> None:
        super().__init__(name="search-copy", daemon=True)
        self._home = home
        self._folder = folder
        self._lock = lock
        self._over = threading.Event()
        self._sent: dict[str, tuple[int, int]] = {}
        self._lost: JobFailed | None = None

    def run(self) -> None:
        while self._lost is None and not self._over.wait(BEAT_S):
            try:
                self._step()
            except JobFailed as error:
                self._lost = error
            except OSError as error:
                log.warning("the copy in %s waits: %s", self._home.url, error)

    def finish(self) -> None:
        """Complete the copy and release the lock."""
        self._over.set()
        self.join()
        if self._lost is not None:
            raise self._lost
        deadline = time.monotonic() + LAST_S
        while True:
            try:
                self._step()
                self._lock.release()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    found = self._home.unreachable(error)
                    hint = (
                        f"{found.hint}; then orchestrator resume {self._folder.name} on this "
                        "machine completes the copy"
                    )
                    raise Unreachable(found.message, hint) from None
                time.sleep(1.0)

    def _step(self) -> None:
        self._lock.beat()
        files = self._snapshot()
        for name in sorted(files, key=_order):
            state, data = files[name]
            if data is not None:
                self._home.write(self._folder, name, data)
                self._sent[name] = state
        for name in set(self._sent) - set(files):
            self._home.remove(self._folder, name)
            del self._sent[name]

    def _snapshot(self) -> dict[str, tuple[tuple[int, int], bytes | None]]:
        """Return a consistent snapshot of the folder: each file's state, and contents if changed.

        The contents are None for a file that the store already has in this state. The journal's
        writer adds checkpoints before a line and removes others after it. So if the same
        checkpoints exist before and after everything was read, they include those that the journal
        refers to.
        """
        for _ in range(TRIES):
            before = self._states()
            found = {}
            with suppress(FileNotFoundError):
                for name, state in before.items():
                    new = self._sent.get(name) != state
                    data = (self._folder / name).read_bytes() if new else None
                    if data is not None and name == JOURNAL:
                        data = data[: data.rfind(b"\n") + 1]
                    found[name] = (state, data)
                if _checkpoints(before) == _checkpoints(self._states()):
                    return found
        # The folder changes too quickly: send nothing this time.
        return {name: (state, None) for name, state in self._sent.items()}

    def _states(self) -> dict[str, tuple[int, int]]:
        """Return the time and size of each file to copy.

        They are taken before the file is read, so a file that changes in between is sent again.
        """
        found = {}
        for place, folders, names in os.walk(self._folder):
            if Path(place) == self._folder:
                folders[:] = [it for it in folders if it not in OF_THE_NODE]
            for name in names:
                file = Path(place, name)
                if name.startswith(".") or (Path(place) == self._folder and name in OF_THE_NODE):
                    continue
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    found[file.relative_to(self._folder).as_posix()] = (
                        stat.st_mtime_ns,
                        stat.st_size,
                    )
        return found


def _checkpoints(states: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name in states if name.startswith(f"{CHECKPOINTS}/")}


def _order(name: str) -> tuple[int, str]:
    """Return a sort key: checkpoints first, then other files, then the marks in their order."""
    if name in MARKS:
        return 2 + MARKS.index(name), name
    return (0 if name.startswith(f"{CHECKPOINTS}/") else 1), name
