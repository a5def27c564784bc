"""The identity of a search, saved in its folder so that another process can resume it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from orchestrator.errors import BadInput, SpecError
from orchestrator.job.spec import BEGUN, JobSpec
from orchestrator.job.yaml import load_job, write
from orchestrator.search.prepare import Prepared
from orchestrator.search.state.folder import SearchFolder, searches_folder
from orchestrator.search.state.object_store_copy import remote_home
from orchestrator.tuning.engine import Task
from orchestrator.utils.atomic import write_whole

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
SHOWN = 5
EARLIER_DATA = {"held_out": "random", "empty": "keep", "special_tokens_in_text": "parse"}
"""Values of keys of ``data`` in a job that was saved before these keys existed."""


@dataclass(frozen=True)
class SavedSearch:
    """A search's identity.

    ``pins`` are the registered versions that trials start from, by the reference in the spec.
    ``artifacts`` are the digests of the prompts that trials start from. ``tracking_uri`` is stored
    without a password.
    """

    data_fingerprint: str
    tokenizer: str
    trials: list[dict[str, Any]]
    pins: dict[str, str]
    artifacts: dict[str, str]
    tracking_uri: str
    run_id: str
    created: str
    format_version: int = FORMAT_VERSION
    warnings: list[str] = field(default_factory=list)
    """Warnings about the data when the search began."""

    @classmethod
    def of(
        cls, prepared: Prepared, pins: Mapping[str, str], tracking_uri: str, run_id: str
    ) -> SavedSearch:
        return cls(
            data_fingerprint=prepared.rows.fingerprint,
            tokenizer=prepared.source.info("").tokenizer_digest,
            trials=[spec.config() for spec in prepared.trials],
            pins=dict(pins),
            artifacts=digests(prepared.task),
            tracking_uri=tracking_uri,
            run_id=run_id,
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            warnings=list(prepared.warnings),
        )

    def save(self, folder: SearchFolder, job: JobSpec) -> None:
        """Write the job and then the description: a folder with a description can be resumed."""
        text = write(job.model_dump(exclude_none=True))
        write_whole(folder.job, text.encode())
        write_whole(folder.description, json.dumps(asdict(self), indent=2).encode())

    def check(self, folder: SearchFolder, prepared: Prepared) -> None:
        """Raise BadInput unless the inputs are still those that the search began with."""
        now = SavedSearch.of(prepared, self.pins, self.tracking_uri, self.run_id)
        names = {
            "the data": self.data_fingerprint != now.data_fingerprint,
            "the base model's tokenizer": self.tokenizer != now.tokenizer,
            "the prompts that trials start from": self.artifacts != now.artifacts,
            "the trials that the spec gives in this release": self.trials != now.trials,
        }
        refuse_changes(folder, [name for name, changed in names.items() if changed])


def refuse_changes(folder: SearchFolder, changed: list[str]) -> None:
    """Raise BadInput that names the changed inputs; do nothing if none has changed."""
    if changed:
        raise BadInput(
            f"search {folder.id} can't go on: {' and '.join(changed)} changed since it began",
            f"put back what it began with, or begin anew: orchestrator run {folder.job}",
        )


def load_saved(folder: SearchFolder) -> tuple[SavedSearch, JobSpec]:
    """Load a search's identity and its job.

    Raises BadInput when the folder holds none, or one of a release with another format.
    """
    try:
        document = json.loads(folder.description.read_bytes())
        version = document.get("format_version")
        if version != FORMAT_VERSION:
            raise BadInput(
                f"search {folder.id} has format_version {version!r}, this release reads "
                f"{FORMAT_VERSION}",
                "resume it with the release that began it",
            )
        return SavedSearch(**document), _saved_job(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"search {folder.id} can't be resumed: {folder.description}: {type(error).__name__}: "
            f"{error}",
            "begin anew: orchestrator run JOB",
        ) from None


def _saved_job(folder: SearchFolder) -> JobSpec:
    """Return the search's job as the release that began it understood it."""
    try:
        job = load_job(folder.job)
    except SpecError as error:
        job = _with_conflicts(folder, error)
    earlier = {
        key: value for key, value in EARLIER_DATA.items() if key not in job.data.model_fields_set
    }
    return job.model_copy(update={"data": job.data.model_copy(update=earlier)}) if earlier else job


def _with_conflicts(folder: SearchFolder, error: SpecError) -> JobSpec:
    """Return a job whose only faults are conflicts, which the release that began it allowed."""
    try:
        return JobSpec.model_validate(yaml.safe_load(folder.job.read_bytes()), context=BEGUN)
    except (ValidationError, yaml.YAMLError):
        raise error from None


def find_search(wanted: str) -> SearchFolder:
    """Find a search by its id, the beginning of just one id, its folder, or ``latest``.

    Raises BadInput that lists the existing searches.
    """
    if "/" in wanted or (Path(wanted) / "search.json").is_file():
        folder = SearchFolder(Path(wanted).expanduser().absolute())
        if folder.description.is_file():
            return folder
        raise BadInput(
            f"{wanted} is not the folder of a search that can be resumed", _known(_all())
        )
    _fetch_known(wanted)
    known = _all()
    exact = [folder for folder in known if folder.id == wanted]
    matching = exact or (
        known[-1:] if wanted == "latest" else [it for it in known if it.id.startswith(wanted)]
    )
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise BadInput(
            f"{wanted!r} begins {len(matching)} searches", f"say which: {_names(matching)}"
        )
    raise BadInput(f"no search {wanted!r} in {searches_folder()}", _known(known))


def _fetch_known(wanted: str) -> None:
    """Fetch the searches that ``wanted`` may mean, if searches are kept in a store."""
    if (remote := remote_home()) is not None:
        known = remote.ids()
        for found in (
            known[-1:] if wanted == "latest" else [it for it in known if it.startswith(wanted)]
        ):
            remote.fetch(searches_folder() / found)


def _all() -> list[SearchFolder]:
    """Return the searches that can be resumed, newest last."""
    found = [file for file in searches_folder().glob("*/search.json") if file.is_file()]
    return [
        SearchFolder(file.parent)
        for file in sorted(found, key=lambda file: (file.stat().st_mtime, file))
    ]


def _known(known: list[SearchFolder]) -> str:
    return f"searches here: {_names(known)}" if known else "orchestrator run JOB begins one"


def _names(folders: list[SearchFolder]) -> str:
    newest = [folder.id for folder in reversed(folders)]
    return ", ".join(newest[:SHOWN]) + (", ..." if len(newest) > SHOWN else "")


def digests(task: Task) -> dict[str, str]:
    """Return the sha256 of each prompt that trials start from."""
    return {reference: _digest(tensors) for reference, tensors in task.artifacts.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}|{tuple(tensors[name].shape)}|".encode())
        digest.update(tensors[name].float().numpy().tobytes())
    return digest.hexdigest()
