"""Who may ask: API keys, and without keys only this machine's own names."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping, Sequence

from orchestrator.serving.protocol import ApiError

KEYS_VARIABLE = "ORCHESTRATOR_API_KEYS"
OPEN_PATHS = frozenset({"/health"})


def key_digests(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """sha256 of each API key in the environment; the keys themselves go nowhere else."""
    keys = (key.strip() for key in environment.get(KEYS_VARIABLE, "").split(","))
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key)


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Decides about a request from its path and headers."""

    def __init__(self, digests: Sequence[str] = ()) -> None:
        self._digests = tuple(digests)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """ApiError 401 without a valid key, or 403 for a foreign Host header on a server without keys."""
        if path in OPEN_PATHS:
            return
        if self._digests:
            self._check_key(headers.get("authorization", ""))
        elif not is_loopback(_host_name(headers.get("host", ""))):
            # A web page may point its own name at 127.0.0.1 (DNS rebinding) and read the answers from a browser here.
            raise ApiError(403, "Without API keys this server answers to localhost only", "host_not_allowed")

    def _check_key(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every key is compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "Give a valid API key: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]
