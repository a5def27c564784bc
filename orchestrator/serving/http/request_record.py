"""The record of one request, which is filled for metrics, traces and the access log."""

from __future__ import annotations

import json
import logging
import sys
import uuid
from dataclasses import dataclass, field

from orchestrator.serving.http.access import ApiKey

access_log = logging.getLogger("orchestrator.access")


@dataclass
class RequestRecord:
    """The record of one request.

    ``model`` and ``version`` are those of the registry, and empty until they are known.
    """

    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    key: ApiKey | None = None
    model: str = ""
    version: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    streamed: bool = False
    error: str | None = None
    """The code of the error that the client received."""

    def log(self, method: str, route: str, status: int, seconds: float, peer: str | None) -> None:
        """Log one line of JSON, which contains no text that the client sent."""
        if access_log.isEnabledFor(logging.INFO):
            access_log.info(
                json.dumps(
                    {
                        "request": self.id,
                        "method": method,
                        "route": route,
                        "status": status,
                        "seconds": round(seconds, 6),
                        "peer": peer,
                        "key": self.key.name if self.key else None,
                        "model": self.model or None,
                        "version": self.version,
                        "prompt_tokens": self.prompt_tokens,
                        "completion_tokens": self.completion_tokens,
                        "streamed": self.streamed,
                        "error": self.error,
                    }
                )
            )


def log_to_standard_output() -> None:
    """Write the access log to standard output as lines of JSON, and nowhere else."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.handlers = [handler]
    access_log.propagate = False
    access_log.setLevel(logging.INFO)
