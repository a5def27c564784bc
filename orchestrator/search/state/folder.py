"""A search's folder: its paths, and the lock of whoever runs it."""

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
    """$ORCHESTRATOR_HOME or .orchestrator, in the working directory; of a store, the folder that stands for it here."""
    if (remote := remote_home()) is not None:
        return remote.local
    return Path(os.environ.get("ORCHESTRATOR_HOME", ".orchestrator")).absolute()


def searches_folder() -> Path:
    """Where searches keep their state."""
    return home_folder() / "searches"


def check_home() -> None:
    """Raise Unreachable, before anything is spent, when searches are kept in a store that does not answer."""
    if (remote := remote_home()) is not None:
        remote.check()


@dataclass(frozen=True)
class SearchFolder:
    """Every path of one search."""

    path: Path

    @classmethod
    def new(cls, name: str) -> SearchFolder:
        """A folder for a new search, named after the moment; not made yet."""
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
        """What the search is; written last of what a resumption needs, so that it marks a search that can be."""
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
        """The final document; there once the search is finished."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The search as one HTML page."""
        return self.path / "report.html"

    @property
    def artifact(self) -> Path:
        """A baseline's result, as a folder."""
        return self.path / "artifact"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def unwritten(self) -> Path:
        """Log entries that MLflow did not take."""
        return self.path / "mlflow-unwritten.jsonl"

    @property
    def ray(self) -> Path:
        """What Tune and Train write; of no use to a resumption."""
        return self.path / "ray"

    def fetch(self) -> None:
        """What a store has of the search, where searches are kept in one."""
        if (remote := remote_home()) is not None and self.path.parent == searches_folder():
            remote.fetch(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and be the only one to run the search. The lock falls with its process, however
        that ends. A search that is kept in a store is fetched first, and its copy there follows. Raises BadInput when
        somebody else has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=0), followed(self.path):
                yield
        except Timeout:
            raise BadInput(
                f"search {self.id} is still being run by another process",
                "wait for its end, or interrupt it first",
            ) from None
