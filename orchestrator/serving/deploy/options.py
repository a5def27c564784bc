"""The serving options, shared by the command line, Serve's config files and the replicas."""

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
    """The options of a server: its prompts, address, replicas and limits."""

    models: tuple[str, ...] = ()
    """References to the prompts to serve, such as ``name`` or ``name@alias``.

    If there are none, every registered prompt is served.
    """
    base_model: str | None = None
    """The frozen base model; by default the one that the served prompts were tuned on."""
    revision: str = "main"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    tracking_uri: str | None = None
    registry_uri: str | None = None
    replicas: int = 1
    """The number of replicas, or the minimum if ``max_replicas`` is given.

    With a minimum of 0, no replica runs while there are no requests, which frees the base model's
    memory. One replica still starts at first, to show that the model loads.
    """
    max_replicas: int | None = None
    """The maximum number of replicas when scaling with the load; unset keeps their number fixed."""
    target_ongoing: float = 16
    """The number of concurrent requests per replica that scaling aims at."""
    upscale_seconds: float = 5
    downscale_seconds: float = 120
    cpus: int | None = None
    """Cores per replica; by default half of this machine's cores."""
    gpus: float | None = None
    """GPUs per replica, from 0 to 1; by default 1 if there are enough for all replicas, else 0."""
    prompt_bytes: int = MAX_BYTES
    """The maximum size in bytes of the prompts' keys and values in the model's memory."""
    host_prompt_bytes: int = MAX_HOST_BYTES
    """The same in the host's memory, for prompts that were evicted from a GPU's memory."""
    poll_seconds: float = POLL_SECONDS
    drain_seconds: float = 60
    """The time in seconds that a stopping replica has to finish its running requests."""
    retry_dead: bool = False
    """Retry a request on another replica when a replica dies before its answer began.

    Costs an additional hop for every request.
    """
    access_log: bool = False
    """Write a line of JSON to the replica's standard output for each request."""
    tls_cert: str | None = None
    tls_key: str | None = None
    """The file of the key that belongs to ``tls_cert``, a certificate file; both enable HTTPS."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    request_limits: RequestLimits = field(default_factory=RequestLimits)

    @property
    def url(self) -> str:
        """The URL at which this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        scheme = "https" if self.tls_cert else "http"
        return (
            f"{scheme}://"
            f"{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"
        )

    @property
    def cores(self) -> int:
        """The number of cores per replica, with the default filled in."""
        return self.cpus or max(1, (os.cpu_count() or 1) // 2)

    def check(self) -> None:
        """Raise BadInput for options that are out of range or contradict each other."""
        if self.max_replicas is not None and self.max_replicas < max(1, self.replicas):
            raise BadInput(
                f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}",
                "raise --max-replicas or lower --replicas",
            )
        if self.replicas < 1 and self.max_replicas is None:
            raise BadInput(
                "--replicas 0 leaves no replica to answer requests",
                "add --max-replicas: replicas then start when requests arrive",
            )
        if not 0 <= (self.gpus or 0) <= 1:
            raise BadInput(
                f"gpus: {self.gpus:g}: a replica computes on one GPU, a part of one, or none",
                "set gpus to a number from 0 to 1; add replicas to use more GPUs",
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadInput("TLS needs a certificate and its key", "give --tls-cert and --tls-key")


def options_from(args: Mapping[str, Any]) -> ServeOptions:
    """Read the options from the ``args`` of a Serve config file; BadInput for an unknown key."""
    nested: dict[str, Any] = {"limits": EngineLimits, "request_limits": RequestLimits}
    option_names = {option.name for option in fields(ServeOptions)}
    for name in args:
        if name not in option_names:
            raise BadInput(
                f"args of the serving application has no {name!r}",
                f"allowed: {', '.join(sorted(option_names))}",
            )
    values: dict[str, Any] = {
        name: nested[name](**value) if name in nested else value for name, value in args.items()
    }
    return ServeOptions(**{**values, "models": tuple(values.get("models", ()))})
