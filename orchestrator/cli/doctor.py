"""Checks of this machine for ``orchestrator doctor``: each finding, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import first_line, mask_secrets
from orchestrator.utils.wording import counted

LIBRARIES = ("torch", "transformers", "datasets", "ray", "mlflow", "safetensors", "fastapi")
NEEDED_GB = 2.0
INSTALL_AGAIN = "install the package again, with pip; in a clone: make venv"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; ``fix`` is empty when nothing has to be fixed."""

    what: str
    found: str
    ok: bool = True
    fix: str = ""

    def document(self) -> JsonObject:
        return asdict(self)

    def __str__(self) -> str:
        mark = "ok  " if self.ok else "FIX "
        return f"{mark}{self.what}: {self.found}" + (f"\n    next: {self.fix}" if self.fix else "")


def examine() -> list[CheckResult]:
    """Run every check. A check that raises becomes a finding too."""
    checks = [_python, _libraries, _device, _room, _cluster, _registry, _searches, _hub]
    findings = []
    for check in checks:
        try:
            findings.extend(check())
        except OrchestratorError as error:
            findings.append(
                CheckResult(check.__name__.lstrip("_"), error.message, False, error.hint)
            )
        except Exception as error:  # a broken installation of a library may raise anything
            found = first_line(error, with_type=True)
            findings.append(CheckResult(check.__name__.lstrip("_"), found, False, INSTALL_AGAIN))
    return findings


def _python() -> list[CheckResult]:
    ok = sys.version_info >= (3, 11)
    return [
        CheckResult(
            "python",
            sys.version.split()[0],
            ok,
            "" if ok else "install it with Python 3.11 or newer",
        )
    ]


def _libraries() -> list[CheckResult]:
    found = []
    for name in LIBRARIES:
        try:
            found.append(CheckResult(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(CheckResult(name, "not installed", False, INSTALL_AGAIN))
    return found


def _device() -> list[CheckResult]:
    import torch

    cores = CheckResult("cpu", f"{os.cpu_count()} cores")
    if not torch.cuda.is_available():
        return [cores, CheckResult("accelerator", "none; searches run on the CPU")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [cores, CheckResult("accelerator", ", ".join(names))]


def _room() -> list[CheckResult]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    ok = free >= NEEDED_GB
    return [
        CheckResult(
            "disk",
            f"{free:.0f} GB free here",
            ok,
            "" if ok else f"free {NEEDED_GB:.0f} GB: searches write here",
        )
    ]


def _cluster() -> list[CheckResult]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return [CheckResult("Ray", "RAY_ADDRESS is not set: searches start Ray on this machine")]
    from orchestrator.cluster.nodes import nodes
    from orchestrator.cluster.session import ray_session

    with ray_session(address):
        total = nodes()
    cpus, gpus = sum(node.cpus for node in total), sum(node.gpus for node in total)
    return [
        CheckResult(
            "Ray", f"{mask_secrets(address)}: {len(total)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
        )
    ]


def _registry() -> list[CheckResult]:
    from orchestrator.registry import Registry

    registry = Registry.connect()
    return [
        CheckResult(
            "registry", f"{registry.display_uri}: {counted(len(registry.list_models()), 'model')}"
        )
    ]


def _searches() -> list[CheckResult]:
    from orchestrator.search.state.folder import home_folder
    from orchestrator.search.state.object_store_copy import remote_home

    if (remote := remote_home()) is not None:
        return [
            CheckResult(
                "searches",
                f"{remote.url}: {len(remote.ids())}; a copy of them here in {remote.local}",
            )
        ]
    return [CheckResult("searches", f"kept in {home_folder()}")]


def _hub() -> list[CheckResult]:
    if os.environ.get("HF_HUB_OFFLINE"):
        return [
            CheckResult(
                "hub",
                "HF_HUB_OFFLINE is set: models and data come from local folders and the cache",
            )
        ]
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return [
        CheckResult(
            "hub",
            f"cache in {home}; HF_TOKEN is {'set' if os.environ.get('HF_TOKEN') else 'not set'}",
        )
    ]
