"""Access control: API keys with their permissions; without keys, only local clients are admitted.

A key is identified by its SHA-256 digest. Neither the key file nor the replicas contain keys in
plain text.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orchestrator.errors import BadInput
from orchestrator.serving.http.protocol import ApiError

KEYS_VARIABLE = "ORCHESTRATOR_API_KEYS"
KEYS_FILE_VARIABLE = "ORCHESTRATOR_API_KEYS_FILE"
OPEN_PATHS = frozenset({"/health"})


@dataclass(frozen=True)
class ApiKey:
    """One API key: its name in logs, its digest and its permissions."""

    name: str
    sha256: str
    models: tuple[str, ...] = ()
    """The registered models that the key may use; empty allows all."""
    per_minute: int | None = None
    """The number of requests per minute that each replica answers; None is unlimited."""

    def allows(self, name: str) -> bool:
        """Tell whether the key may use a registered model."""
        return not self.models or name in self.models


class _KeyEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    models: list[str] = []
    per_minute: int | None = Field(None, ge=1)


def load_keys(environment: Mapping[str, str] = os.environ) -> tuple[ApiKey, ...]:
    """Load the keys that the environment gives.

    ORCHESTRATOR_API_KEYS holds keys in plain text, separated by commas; ORCHESTRATOR_API_KEYS_FILE
    names a file of digests. Raises BadInput for a file that can't be read.
    """
    texts = (text.strip() for text in environment.get(KEYS_VARIABLE, "").split(","))
    keys = [
        ApiKey(f"key-{number}", _digest(text)) for number, text in enumerate(filter(None, texts), 1)
    ]
    if file := environment.get(KEYS_FILE_VARIABLE):
        keys += read_keys(Path(file))
    return tuple(keys)


def read_keys(file: Path) -> list[ApiKey]:
    """Read a key file that ``add_key`` wrote; BadInput if it can't be read."""
    try:
        entries = TypeAdapter(list[_KeyEntry]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise BadInput(
            f"the key file {file} can't be read: {reason}",
            "create one with orchestrator key NAME --file FILE",
        ) from None
    return [
        ApiKey(entry.name, entry.sha256, tuple(entry.models), entry.per_minute) for entry in entries
    ]


def add_key(
    file: Path, name: str, models: Sequence[str] = (), per_minute: int | None = None
) -> str:
    """Make a key, add its digest to the file, and return the key.

    The key is stored nowhere else. Raises BadInput when the file has a key of that name.
    """
    keys = read_keys(file) if file.exists() else []
    if any(key.name == name for key in keys):
        raise BadInput(
            f"the key file {file} has a key {name!r}", "choose another name, or delete its entry"
        )
    secret = f"sk-{secrets.token_urlsafe(32)}"
    keys.append(ApiKey(name, _digest(secret), tuple(models), per_minute))
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump([asdict(key) for key in keys], stream, indent=2)
    staging.replace(file)
    return secret


def is_loopback(host: str) -> bool:
    """Tell whether a server bound to ``host`` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Allowance:
    """A token bucket that limits a key's requests.

    It holds up to ``per_minute`` requests and is refilled at the rate of ``per_minute`` a minute.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._left = self._most
        self._clock = clock
        self._at = clock()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one request from the bucket; return 0, or the seconds until one is available."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._at) * self._rate)
            self._at = now
            if self._left >= 1:
                self._left -= 1
                return 0.0
            return (1 - self._left) / self._rate


class Access:
    """The check that admits or refuses a request by its path, headers and peer address."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = tuple(keys)
        self._allowances = {key.sha256: Allowance(key.per_minute) for key in keys if key.per_minute}

    def check(
        self, path: str, headers: Mapping[str, str], peer: str | None = None
    ) -> ApiKey | None:
        """Return the key that a request uses; None on a server without keys and for open paths.

        Raises ApiError 401 without a valid key and 429 beyond the key's rate. On a server without
        keys, raises ApiError 403 for a Host header that is not local or a peer on another machine.
        """
        if path in OPEN_PATHS:
            return None
        if self._keys:
            return self._within_rate(self._known(headers.get("authorization", "")))
        # A web page could point its own host name at 127.0.0.1 (DNS rebinding) and then read the
        # answers from a browser on this machine.
        if not is_loopback(_host_name(headers.get("host", ""))) or (peer and _is_elsewhere(peer)):
            raise ApiError(
                403, "Without API keys this server answers to localhost only", "host_not_allowed"
            )
        return None

    def _known(self, authorization: str) -> ApiKey:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # Compare with every key, so that the time taken reveals nothing.
        matches = [entry for entry in self._keys if hmac.compare_digest(digest, entry.sha256)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "Give a valid API key: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return matches[0]

    def _within_rate(self, key: ApiKey) -> ApiKey:
        if (allowance := self._allowances.get(key.sha256)) and (seconds := allowance.take()):
            headers = {"Retry-After": str(math.ceil(seconds))}
            message = (
                f"This key may ask {key.per_minute} times a minute; "
                f"try again in {math.ceil(seconds)} s"
            )
            raise ApiError(429, message, "rate_limit_exceeded", headers=headers)
        return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _host_name(header: str) -> str:
    """Return the host name in a Host header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]


def _is_elsewhere(peer: str) -> bool:
    """Tell whether a peer address is an IP address other than loopback.

    The name of a socket is not an IP address and counts as local.
    """
    try:
        return not ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return False
