"""Ray's job client with what it lacks, by its private names. Checked on Ray 2.60."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.cluster.ray_internals.settings import quiet_job_loggers

# Ray's client would prefer these variables to the address that it is given.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def job_client(address: str, token: str | None, timeout: tuple[float, float]) -> Any:
    """Create Ray's client for exactly this address, with a time limit for each request.

    Ray sets no limit: a server that stops answering would be waited for without end. The client's
    ``ray_version`` is the cluster's version of Ray, which Ray's client keeps to itself.
    """
    from ray.job_submission import JobSubmissionClient

    quiet_job_loggers()

    class Client(JobSubmissionClient):
        @property
        def ray_version(self) -> str:
            return str(self._server_ray_version)

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": timeout, **options})

    hidden_variables = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    finally:
        os.environ.update(hidden_variables)
