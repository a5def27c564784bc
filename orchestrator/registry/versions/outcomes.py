"""The outcomes of a version on rows that it was tested on, as files beside what they belong to.

Those of the version's own test split lie beside its prompt. Those of an evaluation are artifacts of
the evaluation's run. A tag says that there is a file, so nothing is looked for in vain.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.registry.aliases.gate import EVALUATION_TAG
from orchestrator.registry.store import Store
from orchestrator.registry.versions.records import VersionSummary

FOLDER = "outcomes"
OUTCOMES_TAG = "orchestrator.data.outcomes"
"""A version's tag: the fingerprint of the test rows whose outcomes lie beside its prompt."""
MAX_OUTCOMES_BYTES = 1 << 28


def outcomes_path(fingerprint: str) -> str:
    """Return the path of a file of outcomes, in a version's folder or a run's artifacts."""
    return f"{FOLDER}/{fingerprint}.npz"


def write_outcomes(folder: Path, outcomes: Mapping[str, RowOutcomes]) -> None:
    """Write files of outcomes, by the rows' fingerprint, below a folder."""
    for fingerprint, found in outcomes.items():
        file = folder / outcomes_path(fingerprint)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(found.to_bytes())


def read_outcomes(store: Store, version: VersionSummary, fingerprint: str) -> RowOutcomes | None:
    """Read the outcomes on the rows of a fingerprint; None if there are none to read."""
    # A run may have been deleted and a file damaged: then the confidence is unknown, and no more.
    with suppress(Exception):
        location = _location(store, version, fingerprint)
        if location is not None:
            return RowOutcomes.from_bytes(_content(store, location, outcomes_path(fingerprint)))
    return None


def _location(store: Store, version: VersionSummary, fingerprint: str) -> str | None:
    if version.tags.get(OUTCOMES_TAG) == fingerprint:
        number = str(version.version)
        return str(store.client.get_model_version_download_uri(version.name, number))
    evaluation = json.loads(version.tags.get(EVALUATION_TAG + fingerprint, "{}"))
    if not evaluation.get("outcomes"):
        return None
    return str(store.client.get_run(evaluation["run_id"]).info.artifact_uri)


def _content(store: Store, location: str, path: str) -> bytes:
    import mlflow.artifacts

    scheme = urlsplit(location).scheme
    if scheme in ("", "file"):
        # MLflow unquotes plain paths too.
        return _limited(Path(unquote(urlsplit(location).path if scheme else location), path))
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        file = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location.rstrip('/')}/{path}",
            dst_path=scratch,
            tracking_uri=store.tracking_uri,
        )
        return _limited(Path(file))


def _limited(file: Path) -> bytes:
    with file.open("rb") as stream:
        content = stream.read(MAX_OUTCOMES_BYTES + 1)
    return content if len(content) <= MAX_OUTCOMES_BYTES else b""
