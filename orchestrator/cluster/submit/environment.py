"""The environment variables that a submitted job gets from this machine.

Ray stores a job's environment variables where everyone who may list the cluster's jobs can read
them. So secrets stay on this machine unless the user asks for them by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import BadInput
from orchestrator.utils.text import HIDDEN, holds_login

MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
HUB = "HF_"
# Paths of this machine, which mean nothing on another one.
PLACE = re.compile(r"_(HOME|CACHE|PATH|DIR|FILE)$")
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|(^|_)KEY($|_)|^MLFLOW_TRACKING_USERNAME$")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OURS = re.compile(r"^(ORCHESTRATOR_|RAY_)")


@dataclass(frozen=True)
class Environment:
    """The variables of a job, and notes about them for the user.

    ``public`` variables may be shown; ``private`` variables never are.
    """

    public: dict[str, str]
    private: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def variables(self) -> dict[str, str]:
        return {**self.public, **self.private}

    def shown(self) -> dict[str, str]:
        return {**self.public, **dict.fromkeys(self.private, HIDDEN)}


def forwarded(environment: Mapping[str, str], requested: Sequence[str] = ()) -> Environment:
    """Select MLflow's addresses, the hub's settings and the variables that the user asks for.

    ``requested`` holds NAME or NAME=VALUE. Raises BadInput for a name that is not set or not
    allowed, and for an address with a login before its host or in its query.
    """
    private = dict(_asked(text, environment) for text in requested)
    forwardable = {
        name: value
        for name, value in environment.items()
        if value and (name in MLFLOW or name.startswith(HUB))
    }
    public = {
        name: value
        for name, value in forwardable.items()
        if not (PLACE.search(name) or SECRET.search(name))
    }
    public = {name: value for name, value in sorted(public.items()) if name not in private}
    for name, value in public.items():
        if holds_login(value):
            raise BadInput(
                f"{name} holds a login, and whoever may list the cluster's jobs could read it",
                "set MLFLOW_TRACKING_USERNAME and _PASSWORD on the cluster's nodes, "
                f"or pass it anyway: --env {name}",
            )
    return Environment(public, private, tuple(_kept_back(environment, private)))


def _asked(text: str, environment: Mapping[str, str]) -> tuple[str, str]:
    name, equals_sign, value = text.partition("=")
    if not NAME.fullmatch(name):
        raise BadInput(
            f"--env {name!r} is not the name of a variable", "write --env NAME or --env NAME=VALUE"
        )
    if OURS.match(name):
        raise BadInput(
            f"--env {name} can't be set by a job: Ray and this program use it", "leave it out"
        )
    if not equals_sign and name not in environment:
        raise BadInput(
            f"--env {name}: {name} is not set on this machine",
            f"set it, or write --env {name}=VALUE",
        )
    return name, value if equals_sign else environment[name]


def _kept_back(environment: Mapping[str, str], private: Mapping[str, str]) -> list[str]:
    names = [
        name
        for name in sorted(environment)
        if name.startswith((HUB, "MLFLOW_TRACKING_")) and name not in private
    ]
    secrets = ", ".join(name for name in names if SECRET.search(name))
    if not secrets:
        return []
    return [
        f"{secrets} stays here, since whoever may list the cluster's jobs could read it: "
        "set it on the cluster's nodes, or pass it with --env"
    ]
