"""The package that a job takes to the cluster.

It holds the job spec, the local files that the spec names, and this program's code.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from orchestrator.data.tables import table_suffix
from orchestrator.errors import BadInput
from orchestrator.job.space import init_artifacts
from orchestrator.job.spec import ArtifactInit, DataFiles, Init, JobSpec, MethodSpace
from orchestrator.job.yaml import write
from orchestrator.models.source import SMALL_FILES, WEIGHTS, looks_like_path

JOB = "job.yaml"
INPUTS = "./inputs/"  # begins the paths of packed files in a packed job's spec
MOST_BYTES = 100 << 20  # the largest package that a cluster accepts
SEARCH = "ORCHESTRATOR_SEARCH"  # the search that the job is an attempt at
LABELS = "ORCHESTRATOR_LABELS"  # the user and the labels, as a JSON object
HOME = "ORCHESTRATOR_HOME"

Space = TypeVar("Space", bound=MethodSpace)
Change = Callable[[str, str], str]  # takes a key of the spec and its path, returns the new path


@dataclass(frozen=True)
class PackedFile:
    """A file of this machine and its path in the package."""

    name: str
    source: Path
    size: int
    digest: str

    @classmethod
    def of(cls, name: str, source: Path) -> PackedFile:
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(name, source, source.stat().st_size, digest)


@dataclass(frozen=True)
class Package:
    """A job and the files that it needs.

    ``elsewhere`` are the paths that the cluster must already have.
    """

    job: JobSpec
    files: tuple[PackedFile, ...]
    elsewhere: tuple[str, ...]

    @property
    def text(self) -> str:
        """The job spec as it is packed."""
        return write(self.job.model_dump(exclude_none=True))

    def write(self, folder: Path) -> None:
        folder.mkdir()
        (folder / JOB).write_text(self.text, encoding="utf-8")
        write_files(self.files, folder)


def pack(job: JobSpec, shared: Sequence[Path] = ()) -> Package:
    """Pack every local file that the job names.

    Files below ``shared`` are not packed, because the cluster's nodes have them too. An absolute
    path that does not exist on this machine is assumed to be on the cluster. Raises BadInput for a
    relative path that does not exist, and for more data than a cluster accepts.
    """
    files: list[PackedFile] = []
    elsewhere: list[str] = []

    def take(key: str, text: str) -> str:
        path = Path(text).expanduser()
        if _is_elsewhere(key, path, shared):
            elsewhere.append(str(path))
            return str(path)
        target = INPUTS.removeprefix("./") + _place(key, path)
        files.extend(PackedFile.of(f"{target}{name}", file) for name, file in _found(key, path))
        return f"./{target}"

    packed = moved(job, take)
    if (size := sum(file.size for file in files)) > MOST_BYTES:
        largest = max(files, key=lambda file: file.size)
        raise BadInput(
            f"the job names {_megabytes(size)} of local files (the largest: {largest.source}), "
            f"and a package holds {_megabytes(MOST_BYTES)}",
            "name a hub id, or put them where the cluster's nodes have them too "
            "and say --shared FOLDER",
        )
    return Package(packed, tuple(files), tuple(elsewhere))


def unpacked(folder: Path, inputs: Path) -> tuple[str, list[tuple[Path, Path]]]:
    """Return the text of the spec in a package's ``folder``, and the files to copy.

    The spec names its files by their new paths below ``inputs``, a folder that outlives the
    package. Each file comes as a pair of its source and its target.
    """
    from orchestrator.job.yaml import load_job

    copies = [
        (file, inputs / file.relative_to(folder / INPUTS))
        for file in sorted((folder / INPUTS).rglob("*"))
    ]

    def place(key: str, text: str) -> str:
        return str(inputs / text.removeprefix(INPUTS)) if text.startswith(INPUTS) else text

    job = moved(load_job(folder / JOB), place)
    text = write(job.model_dump(exclude_none=True))
    return text, [(source, target) for source, target in copies if source.is_file()]


def moved(job: JobSpec, change: Change) -> JobSpec:
    """Return the job with ``change`` applied to every file and folder that it names."""
    data, space, base = job.data, job.search.space, job.base_model
    if isinstance(data.path, DataFiles):
        moved_paths = {
            split: change(f"data.path.{split}", text)
            for split, text in data.path
            if text is not None
        }
        data = data.model_copy(update={"path": data.path.model_copy(update=moved_paths)})
    if _is_local(base.id):
        base = base.model_copy(update={"id": change("base_model.id", base.id)})
    if init_artifacts(space):
        parts = {
            method: _moved_space(f"search.space.method.{method}", part, change)
            for method, part in (space.method or {}).items()
        }
        space = _moved_space("search.space", space, change)
        space = space.model_copy(update={"method": parts or None})
    search = job.search.model_copy(update={"space": space})
    return job.model_copy(update={"data": data, "base_model": base, "search": search})


def _moved_space(key: str, space: Space, change: Change) -> Space:
    """Return a space with ``change`` applied to the prompts that its own ``init`` names."""
    inits = space.init if isinstance(space.init, list) else [space.init]
    moved_inits = [
        _moved_init(f"{key}.init.{number}", init, change) for number, init in enumerate(inits)
    ]
    update = {"init": moved_inits if isinstance(space.init, list) else moved_inits[0]}
    return space.model_copy(update=update) if "init" in space.given else space


def _moved_init(key: str, init: Init | None, change: Change) -> Init | None:
    if not isinstance(init, ArtifactInit) or not _is_local(init.artifact):
        return init  # a registered prompt is fetched on the cluster
    return ArtifactInit(artifact=change(key, init.artifact))


def _is_local(text: str) -> bool:
    return looks_like_path(text) or Path(text).expanduser().is_dir()


def _is_elsewhere(key: str, path: Path, shared: Sequence[Path]) -> bool:
    if path.exists():
        return any(path.resolve().is_relative_to(folder.resolve()) for folder in shared)
    if path.is_absolute():
        return True
    raise BadInput(
        f"{key}: {path} does not exist (looked in {Path.cwd()})",
        "correct the path; what only the cluster has is named by its whole path",
    )


def _place(key: str, path: Path) -> str:
    """Return the path in the package for the file or folder that a key names.

    A folder's path ends with a slash.
    """
    name = key.replace(".", "-")
    return f"{name}/" if path.is_dir() else f"{name}{table_suffix(path) or path.suffix}"


def _found(key: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files at a path, each with its name below the key's path in the package.

    Of a model's folder, only the files that are read from a model are included.
    """
    if not path.is_dir():
        yield "", path
        return
    patterns = [*SMALL_FILES, WEIGHTS, "*.py"] if key == "base_model.id" else ["**/*"]
    paths: set[Path] = set()
    for pattern in patterns:
        paths.update(path.glob(pattern))
    for file in sorted(filter(Path.is_file, paths)):
        yield file.relative_to(path).as_posix(), file


def code_files() -> tuple[PackedFile, ...]:
    """List the files of this package as installed here."""
    folder = Path(__file__).parents[2]
    files = (
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    )
    return tuple(PackedFile.of(file.relative_to(folder.parent).as_posix(), file) for file in files)


def write_files(files: Sequence[PackedFile], folder: Path) -> None:
    for file in files:
        target = folder / PurePosixPath(file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.source, target)


def _megabytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
