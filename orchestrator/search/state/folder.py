"""A search's folder: its paths, and the lock that the process running the search holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.errors import BadInput
from orchestrator.search.state.object_store_copy import followed, remote_home


def home_folder() -> Path:
    """Return the folder for state: $ORCHESTRATOR_HOME, or .orchestrator in the working directory.

    Where $ORCHESTRATOR_HOME is the address of a store, this is the local folder that stands for it.
    """
    if (remote := remote_home()) is not None:
        return remote.local
    return Path(os.environ.get("ORCHESTRATOR_HOME", ".orchestrator")).absolute()


def searches_folder() -> Path:
    """Return the folder in which searches keep their state."""
    return home_folder() / "searches"


def check_home() -> None:
    """Raise Unreachable when searches are kept in a store that does not answer.

    Call this before anything is spent.
    """
    if (remote := remote_home()) is not None:
        remote.check()


@dataclass(frozen=True)
class SearchFolder:
    """The paths of one search."""

    path: Path

    @classmethod
    def new(cls, name: str) -> SearchFolder:
        """Choose a folder for a new search, named after the current time; it is not created yet."""
        first = searches_folder() / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
        return cls(
            next(folder for folder in itertools.chain([first], numbered) if not folder.exists())
        )

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def job(self) -> Path:
        """The job spec as resolved."""
        return self.path / "job.yaml"

    @property
    def description(self) -> Path:
        """The identity of the search.

        It is written after the other files that resuming needs, so a folder that has it can be
        resumed.
        """
        return self.path / "search.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, trial: str, step: int) -> Path:
        return self.checkpoints / f"{trial}-{step}.safetensors"

    @property
    def result(self) -> Path:
        """The final document; it exists once the search is finished."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The search as one HTML page."""
        return self.path / "report.html"

    @property
    def artifact(self) -> Path:
        """The folder with a baseline's result."""
        return self.path / "artifact"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def unwritten(self) -> Path:
        """Log entries that MLflow did not accept."""
        return self.path / "mlflow-unwritten.jsonl"

    @property
    def ray(self) -> Path:
        """Files of Ray Tune and Ray Train; resuming does not need them."""
        return self.path / "ray"

    def fetch(self) -> None:
        """Fetch the search from the store, if searches are kept in a store."""
        if (remote := remote_home()) is not None and self.path.parent == searches_folder():
            remote.fetch(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the search for this process, and create the folder if needed.

        The lock is released when its process ends, however that happens. A search that is kept in a
        store is fetched first, and its copy there is kept up to date. Raises BadInput when another
        process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=0), followed(self.path):
                yield
        except Timeout:
            raise BadInput(
                f"search {self.id} is still being run by another process",
                "wait for its end, or interrupt it first",
            ) from None
