"""Fetching a version's artifact as a local folder: two known files, checked, downloaded once.

The registry is not trusted: none of its code is run, no link is followed, and nothing larger than a
prompt is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.artifact import MANIFEST, MAX_WEIGHTS_BYTES, WEIGHTS, PromptArtifact, file_sha256
from orchestrator.errors import BadInput
from orchestrator.registry.store import Store
from orchestrator.registry.versions.publish import ARTIFACT_PATH
from orchestrator.registry.versions.records import DIGEST_TAG, VersionSummary
from orchestrator.registry.versions.refs import printable

MAX_BYTES = {WEIGHTS: MAX_WEIGHTS_BYTES, MANIFEST: 1 << 24}


def default_cache() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "prompt-orchestrator"
        / "artifacts"
    )


def fetch(store: Store, version: VersionSummary, cache: Path) -> Path:
    """Return a version's checked artifact in the cache.

    Raises BadInput when the version holds no artifact or a changed one.
    """
    location = store.client.get_model_version_download_uri(version.name, str(version.version))
    target = cache / _key(store, version, location)
    if target.exists():
        try:
            return _checked(target, version)
        except BadInput:
            # The copy is damaged, but the store may still have a good one.
            shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
    try:
        _download(store, version, location, staging)
        _checked(staging, version)
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:
            _checked(target, version)  # another process created the folder first
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _key(store: Store, version: VersionSummary, location: str) -> Path:
    """Return the artifact's folder in the cache.

    The key includes the location, because MLflow gives the number of a deleted latest version to
    the next version.
    """
    digest = hashlib.sha256(
        f"{store.registry_uri}\n{version.name}\n{location}".encode()
    ).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", version.name)[:60]
    return Path(f"{readable}-{version.version}-{digest}")


def _checked(folder: Path, version: VersionSummary) -> Path:
    """Return the folder; raise BadInput unless it holds the artifact that was registered."""
    PromptArtifact.load(folder)
    expected = version.tags.get(DIGEST_TAG)
    if expected is not None and file_sha256(folder / MANIFEST) != expected:
        raise _refusal(version, f"{MANIFEST} was altered after it was registered")
    return folder


def _download(store: Store, version: VersionSummary, location: str, staging: Path) -> None:
    scheme = urlsplit(location).scheme
    if scheme in ("", "file"):
        # MLflow unquotes plain paths too.
        path = unquote(urlsplit(location).path if scheme else location)
        _copy_local(version, Path(path) / ARTIFACT_PATH, staging)
    else:
        _download_remote(store, version, f"{location.rstrip('/')}/{ARTIFACT_PATH}", staging)


def _copy_local(version: VersionSummary, folder: Path, staging: Path) -> None:
    try:
        with os.scandir(folder) as entries:
            _only_known_files(
                version,
                {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries},
            )
        for name, limit in MAX_BYTES.items():
            _copy_file(version, folder / name, staging / name, limit)
    except OSError as error:
        raise _refusal(version, f"can't be read ({error.strerror}: {error.filename})") from None


def _copy_file(version: VersionSummary, source: Path, target: Path, limit: int) -> None:
    # The flags refuse a link, and don't block on a pipe.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refusal(version, f"{source.name} is not a plain file")
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise _refusal(version, f"{source.name} is larger than {limit} bytes")
    target.write_bytes(content)


def _download_remote(store: Store, version: VersionSummary, uri: str, staging: Path) -> None:
    import mlflow.artifacts

    listing = mlflow.artifacts.list_artifacts(artifact_uri=uri, tracking_uri=store.tracking_uri)
    _only_known_files(
        version, {entry.path.rsplit("/", 1)[-1]: entry.file_size or 0 for entry in listing}
    )
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".fetch-") as scratch:
        for name, limit in MAX_BYTES.items():
            got = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{uri}/{name}", dst_path=scratch, tracking_uri=store.tracking_uri
            )
            _copy_file(version, Path(got), staging / name, limit)


def _only_known_files(version: VersionSummary, sizes: dict[str, int]) -> None:
    if not sizes:
        raise _refusal(
            version,
            "holds no prompt artifact; another program registered it, or its files were deleted",
        )
    if set(sizes) != set(MAX_BYTES):
        found = ", ".join(printable(name) for name in sorted(sizes)[:5])
        raise _refusal(
            version, f"should hold {WEIGHTS} and {MANIFEST} and nothing else, found {found}"
        )
    for name, size in sizes.items():
        if size > MAX_BYTES[name]:
            raise _refusal(version, f"{name} has {size} bytes, more than any soft prompt")


def _refusal(version: VersionSummary, what: str) -> BadInput:
    return BadInput(
        f"version {version.version} of {printable(version.name)}: {what}",
        "choose another version, or register the prompt again from its search",
    )
