"""The request that submits a job.

It is built without a cluster, so that it can be shown before it is sent.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.cluster.submit.environment import Environment
from orchestrator.cluster.submit.package import HOME, LABELS, SEARCH, Package, PackedFile
from orchestrator.errors import BadInput
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import mask_secrets

# A shell runs this command, so it contains no text from users.
ENTRYPOINT = "python -m orchestrator on-cluster"
# The time between SIGTERM and SIGKILL. Ray's own 3 s are too short for closing the MLflow runs.
STOP_SECONDS = "60"
KEY_LENGTH = 12
LABEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]{0,62})=([\x20-\x7e]{0,200})")
SEARCH_KEY = "search"  # this and the keys below are metadata that the other commands read
NAME_KEY = "name"
USER_KEY = "user"
LABEL_PREFIX = "label."


@dataclass(frozen=True)
class SubmitRequest:
    """Everything that is sent to the cluster, except the number of the attempt.

    Equal inputs give equal IDs.
    """

    package: Package
    code: tuple[PackedFile, ...]
    """This program's files; empty if the cluster's image has them."""
    environment: Environment
    pip: tuple[str, ...]
    home: str | None
    labels: Mapping[str, str]
    cpus: float

    @property
    def base_id(self) -> str:
        """The ID of the first attempt.

        It is the job's name and a digest of everything that decides the job's behaviour.
        """
        settled = {
            "job": self.package.text,
            "files": [(file.name, file.digest) for file in self.package.files],
            "code": [(file.name, file.digest) for file in self.code] or __version__,
            "environment": [self.environment.public, sorted(self.environment.private)],
            "pip": self.pip,
            "home": self.home,
        }
        digest = hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()
        return f"{self.package.job.name}-{digest[:KEY_LENGTH]}"

    def metadata(self, search: str) -> dict[str, str]:
        """Build the job's metadata for the cluster's list of jobs.

        Costs are attributed to users and labels by it.
        """
        metadata = {
            NAME_KEY: self.package.job.name,
            SEARCH_KEY: search,
            USER_KEY: user(),
            "host": socket.gethostname(),
            "orchestrator": __version__,
        }
        return metadata | {f"{LABEL_PREFIX}{name}": value for name, value in self.labels.items()}

    def _variables(self, search: str) -> dict[str, str]:
        search_variables = {SEARCH: search, LABELS: json.dumps({USER_KEY: user(), **self.labels})}
        home = {HOME: self.home} if self.home else {}
        return {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **search_variables, **home}

    def runtime_env(self, search: str, working_dir: Path, code: Path) -> dict[str, Any]:
        """Build Ray's runtime environment from the folders that were written for it."""
        runtime_env: dict[str, Any] = {
            "working_dir": str(working_dir),
            "env_vars": {**self.environment.variables, **self._variables(search)},
        }
        if self.code:
            runtime_env["py_modules"] = [str(code)]
        if self.pip:
            runtime_env["pip"] = {"packages": list(self.pip), "pip_check": False}
        return runtime_env

    def document(self, address: str) -> JsonObject:
        """Build the document that ``--dry-run`` shows.

        It omits the values of private variables and the logins in addresses.
        """
        search = self.base_id
        variables = self.environment.shown() | self._variables(search)
        return {
            "address": mask_secrets(address),
            "submission_id": search,
            "entrypoint": ENTRYPOINT,
            "entrypoint_num_cpus": self.cpus,
            "metadata": self.metadata(search),
            "runtime_env": {
                "working_dir": [_file(file) for file in self.package.files],
                "py_modules": {"orchestrator": len(self.code)} if self.code else None,
                "pip": [mask_secrets(line) for line in self.pip] or None,
                "env_vars": {name: mask_secrets(value) for name, value in variables.items()},
            },
            "job": self.package.job.model_dump(mode="json"),
            "on_the_cluster": list(self.package.elsewhere),
        }


def _file(file: PackedFile) -> JsonObject:
    return {"name": file.name, "from": str(file.source), "bytes": file.size, "sha256": file.digest}


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Parse labels of the form NAME=VALUE; raise BadInput for any other text."""
    labels = {}
    for text in texts:
        if not (match := LABEL.fullmatch(text)):
            raise BadInput(
                f"--label {text!r} is not NAME=VALUE with letters, digits, '.', '_', '-' and '/' "
                "in the name, and a value of at most 200 plain characters",
                "for instance --label project=spam-filter",
            )
        if match[1] == USER_KEY:
            raise BadInput(
                f"--label {USER_KEY} is set already, to whoever submits", "choose another name"
            )
        labels[match[1]] = match[2]
    return labels


def read_pip(file: Path | None) -> tuple[str, ...]:
    """Read the lines of a requirements or constraints file, without comments.

    Raises BadInput for a file that can't be read.
    """
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise BadInput(
            f"--pip {file}: {reason}", "name a requirements file, for instance constraints.txt"
        ) from None
    requirements = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return tuple(line for line in requirements if line)


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container, the user may have no name
        return "unknown"
