"""The working directory of an earlier release, with searches and a registered version in it.

``compatibility/data/earlier_release.tar.gz`` holds a working directory of commit b67b99a: a tiny
random model, 80 rows, ``mlflow.db``, and one finished and one interrupted search. Its
``expected.json`` has the answers of the registered version, and the result of the search as that
commit itself resumed it. Manifests name the model by an absolute path, so the archive is always
unpacked at the same place.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

ARCHIVE = Path(__file__).parent / "compatibility" / "data" / "earlier_release.tar.gz"
FOLDER = Path("/tmp/orchestrator-earlier-release")


@contextmanager
def unpacked() -> Iterator[Path]:
    """Unpack the working directory for the block; other processes wait for their turn."""
    with FileLock(f"{FOLDER}.lock"):
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir()
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(FOLDER, filter="data")
        yield FOLDER
        shutil.rmtree(FOLDER, ignore_errors=True)


def expected(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return document
