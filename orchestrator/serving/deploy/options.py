"""What to serve, where and with what: one value that the command line, Serve's config files and replicas share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.errors import BadInput
from orchestrator.serving.engine.engine import EngineLimits
from orchestrator.serving.http.service import RequestLimits
from orchestrator.serving.prompts.store import MAX_BYTES, MAX_HOST_BYTES, POLL_SECONDS


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, where and with what."""

    models: tuple[str, ...] = ()
    """References as people type them; none serves every registered prompt."""
    base_model: str | None = None
    """The frozen model; by default the one that the served prompts were tuned on."""
    revision: str = "main"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    tracking_uri: str | None = None
    registry_uri: str | None = None
    replicas: int = 1
    """The number of replicas, or with ``max_replicas`` the least; 0 lets go of the model while nobody
    asks, after a first one that shows that it loads."""
    max_replicas: int | None = None
    """Up to how many replicas follow the load; without it their number is fixed."""
    target_ongoing: float = 16
    """Requests under way in each replica that scaling aims at."""
    upscale_seconds: float = 5
    downscale_seconds: float = 120
    cpus: int | None = None
    """Cores of a replica; half of this machine's unless given."""
    gpus: float | None = None
    """Accelerators of a replica, 1 at most; one where the cluster has any, unless given."""
    prompt_bytes: int = MAX_BYTES
    """Keys and values of prompts in the memory that the model is in."""
    host_prompt_bytes: int = MAX_HOST_BYTES
    """The same in the host's memory, for those that had to leave an accelerator's."""
    poll_seconds: float = POLL_SECONDS
    drain_seconds: float = 60
    """A replica that has to go answers what it has for so long."""
    retry_dead: bool = False
    """Ask another replica when one dies before its answer began; costs a hop for every request."""
    access_log: bool = False
    """A line of JSON on a replica's standard output for each request."""
    tls_cert: str | None = None
    tls_key: str | None = None
    """Files of a certificate and its key: HTTPS."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    request_limits: RequestLimits = field(default_factory=RequestLimits)

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"

    @property
    def cores(self) -> int:
        return self.cpus or max(1, (os.cpu_count() or 1) // 2)

    def check(self) -> None:
        """BadInput for options that contradict each other."""
        if self.max_replicas is not None and self.max_replicas < max(1, self.replicas):
            raise BadInput(
                f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}",
                "give a larger number",
            )
        if self.replicas < 1 and self.max_replicas is None:
            raise BadInput(
                "0 replicas answer nothing",
                "add --max-replicas: they then start when somebody asks",
            )
        if not 0 <= (self.gpus or 0) <= 1:
            raise BadInput(
                f"gpus: {self.gpus:g}: a replica computes on one GPU, a part of one, or none",
                "give 0 to 1; more replicas take more",
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadInput("TLS needs a certificate and its key", "give --tls-cert and --tls-key")


def options_from(args: Mapping[str, Any]) -> ServeOptions:
    """The options of a Serve config file's ``args``. BadInput for a key that is none."""
    nested: dict[str, Any] = {"limits": EngineLimits, "request_limits": RequestLimits}
    known = {it.name for it in fields(ServeOptions)}
    for name in args:
        if name not in known:
            raise BadInput(
                f"args of the serving application has no {name!r}",
                f"allowed: {', '.join(sorted(known))}",
            )
    values: dict[str, Any] = {
        name: nested[name](**value) if name in nested else value for name, value in args.items()
    }
    return ServeOptions(**{**values, "models": tuple(values.get("models", ()))})
