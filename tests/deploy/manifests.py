"""Helpers that read deploy/ for the tests: files, built overlays, pods within documents."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SCHEMAS = ROOT.parent / "shared" / "schemas"
BASES = ("base", "tuning", "serving", "monitoring")
SIZES = ("small", "large")
OVERLAYS = tuple(f"overlays/{size}{part}" for size in SIZES for part in ("", "/tuning", "/serving"))
OURS = ("prompt-orchestrator", "prompt-orchestrator-mlflow")
Document = dict[str, Any]


def version() -> str:
    """Return the project's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def pinned() -> dict[str, str]:
    """Map each package to its version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def yaml_files() -> list[Path]:
    return sorted(file for file in DEPLOY.rglob("*.yaml") if "secrets" not in file.parts)


def documents(file: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document is not None]


@lru_cache
def built_text(folder: str) -> str:
    """Return what ``kubectl kustomize`` builds from a folder of deploy/kubernetes.

    Skips the test where kubectl is not installed.
    """
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    argv = ["kubectl", "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@lru_cache
def built(folder: str) -> list[Document]:
    """Return the documents of a built folder; they are cached, so callers must not change them."""
    return list(yaml.load_all(built_text(folder), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def pods(document: Any, at: str = "") -> Iterator[tuple[str, Document]]:
    """Yield every pod template within a document, with its path in the document.

    A pod template is a mapping with metadata and spec.
    """
    if isinstance(document, dict):
        if isinstance(spec := document.get("spec"), dict) and "containers" in spec:
            yield at, document
        for key, value in document.items():
            yield from pods(value, f"{at}/{key}")
    elif isinstance(document, list):
        for place, value in enumerate(document):
            yield from pods(value, f"{at}/{place}")


def all_pods(folder: str) -> list[tuple[str, Document]]:
    """Return the pod templates of a built folder, labelled with their owner's kind and name."""
    return [
        (f"{document['kind']} {document['metadata']['name']}{at}", pod)
        for document in built(folder)
        for at, pod in pods(document)
    ]


def whole(size: str) -> list[Document]:
    """Return all documents of the overlays of this size, search and service included."""
    return [document for folder in OVERLAYS if f"/{size}" in folder for document in built(folder)]


def whole_pods(size: str) -> list[tuple[str, Document]]:
    return [it for folder in OVERLAYS if f"/{size}" in folder for it in all_pods(folder)]


def labels(pod: Document) -> dict[str, str]:
    return dict(pod.get("metadata", {}).get("labels", {}))


def found(value: Any, key: str) -> Iterator[Any]:
    """Yield every value under ``key``, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from found(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from found(inner, key)


def quantity(text: Any) -> float:
    """Convert a Kubernetes quantity to a number of cores or bytes."""
    match = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi|Ti)?", str(text))
    assert match, text
    scale = {None: 1.0, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * scale[match[2]]


def check_ray_command(words: list[str]) -> None:
    """Check that Ray's own command line parses the words; nothing is run."""
    from ray.scripts.scripts import cli

    assert words[0].rpartition("/")[2] == "ray", words
    context = cli.make_context("ray", list(words[1:]))
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, list(rest), parent=context)
