"""Copies of a base model's folder on nodes that lack it.

Such a node fetches the files once, for all its workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import actors
from orchestrator.cluster.actors import ActorMethod
from orchestrator.errors import JobFailed
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.builtin import cache_folder
from orchestrator.models.source import SMALL_FILES, WEIGHTS, ModelSource, resolve_model
from orchestrator.utils.atomic import make_folder_once

CHUNK = 64 << 20  # bytes of an answer; the object store holds only a few answers at a time
FILES = (*SMALL_FILES, WEIGHTS, "*.py")


@dataclass(frozen=True)
class Listing:
    """The names and sizes of the files, and a key that changes whenever the folder does."""

    key: str
    sizes: dict[str, int]


class ModelFiles:
    """An actor on the driver's node that reads the folder's files."""

    def __init__(self, folder: Path, chunk: int = CHUNK) -> None:
        self._folder = folder
        self._chunk = chunk

    def listing(self) -> Listing:
        """List the files that a model is loaded from."""
        found = sorted(
            {file for pattern in FILES for file in self._folder.glob(pattern) if file.is_file()}
        )
        states = [(file.name, file.stat()) for file in found]
        text = repr(
            [self._folder, *((name, state.st_size, state.st_mtime_ns) for name, state in states)]
        )
        return Listing(
            hashlib.sha256(text.encode()).hexdigest()[:24],
            {name: it.st_size for name, it in states},
        )

    def read(self, name: str, start: int) -> bytes:
        """Read up to a chunk of a file, from byte ``start``."""
        with (self._folder / name).open("rb") as stream:
            stream.seek(start)
            return stream.read(self._chunk)


class ModelFilesHandle:
    """The methods of ``ModelFiles`` as other processes call them."""

    listing = ActorMethod(ModelFiles.listing)
    read = ActorMethod(ModelFiles.read)


def start_files(spec: BaseModelSpec) -> ModelFilesHandle | None:
    """Start the actor for a local folder if the cluster has several nodes.

    Returns None if the model is no local folder or the cluster has a single node.
    """
    folder = Path(spec.id)
    if not folder.is_dir() or sum(node["Alive"] for node in ray.nodes()) < 2:
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(ModelFiles).remote(folder)
    return cast(ModelFilesHandle, actor)


def model_source(spec: BaseModelSpec, files: ModelFilesHandle | None) -> ModelSource:
    """Find the base model on this node, and fetch a copy if the node lacks the model's folder.

    Raises JobFailed when the copy can't be made, and the errors of ``resolve_model``.
    """
    if files is None or Path(spec.id).is_dir():
        return resolve_model(spec)
    copy = fetched(files)
    return replace(resolve_model(spec.model_copy(update={"id": str(copy)})), id=spec.id)


def fetched(files: ModelFilesHandle) -> Path:
    """Return the copy in this node's cache, and make it first if it is missing.

    A lock lets other workers wait for the worker that makes the copy. A copy is either complete or
    absent. Raises JobFailed when it can't be written.
    """
    listing = actors.get(files.listing.remote())
    folder = cache_folder() / "base-models" / listing.key
    try:
        make_folder_once(folder, lambda staging: _fetch(files, listing, staging))
    except OSError as error:
        raise JobFailed(
            f"the base model can't be copied to {folder.parent} of a node: {error.strerror}",
            "make room there, set ORCHESTRATOR_CACHE, or put the model's folder on every node",
        ) from None
    return folder


def _fetch(files: ModelFilesHandle, listing: Listing, staging: Path) -> None:
    """Copy the files into ``staging``; raises JobFailed if one became shorter meanwhile."""
    for name, size in listing.sizes.items():
        with (staging / name).open("wb") as stream:
            while stream.tell() < size:
                if not (data := actors.get(files.read.remote(name, stream.tell()))):
                    raise JobFailed(
                        f"the base model's file {name} became shorter while it was copied",
                        "run it again",
                    )
                stream.write(data)
