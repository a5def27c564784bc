"""A client of Ray's job server that translates its errors into ours."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from orchestrator.cluster.ray_internals.jobs import job_client
from orchestrator.errors import BadInput, OrchestratorError, Unreachable
from orchestrator.utils.text import last_line, mask_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # a local `ray start --head`, or a forwarded port
OLDEST_RAY = (2, 60)  # the minimum in pyproject.toml
ANSWER_S = (10.0, 120.0)  # the limits for connecting and for an answer
ENDED = ("succeeded", "failed", "stopped")


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    ``status`` is pending, running, succeeded, failed or stopped. ``started`` and ``ended`` are in
    seconds since 1970, and None before they are known.
    """

    id: str
    status: str
    exit_code: int | None
    error_type: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.status in ENDED

    @property
    def seconds(self) -> float | None:
        """The job's duration; its duration so far if it has not ended."""
        return None if self.started is None else (self.ended or time.time()) - self.started


class AlreadyThere(OrchestratorError):
    """The cluster already has a job of that ID, because another program submitted it first."""


class Cluster:
    """The job server at a dashboard's address."""

    def __init__(self, address: str | None = None) -> None:
        """Check the address without connecting; raise BadInput if it can't be a dashboard's."""
        self.address = checked_address(address or DEFAULT_ADDRESS)
        self._client: JobSubmissionClient | None = None

    @property
    def shown(self) -> str:
        return mask_secrets(self.address)

    def connect(self) -> list[str]:
        """Connect and check that the cluster's Ray works with this release.

        Returns notes for the user. Raises Unreachable when the cluster does not answer, and
        BadInput when it refuses the token or its Ray is too old.
        """
        import ray

        with self._translated():
            self._client = job_client(self.address, token(os.environ), ANSWER_S)
        cluster_ray = self._client.ray_version
        if _release(cluster_ray) < OLDEST_RAY:
            raise BadInput(
                f"the cluster at {self.shown} runs Ray {cluster_ray}, and this release needs "
                f"{'.'.join(map(str, OLDEST_RAY))} or newer",
                "submit to a cluster with a newer image",
            )
        if _release(cluster_ray) != _release(ray.__version__):
            return [
                f"the cluster runs Ray {cluster_ray}, and here it is {ray.__version__}: "
                "the job runs on the cluster's"
            ]
        return []

    def job(self, job_id: str) -> Job | None:
        """Look up a job; return None when the cluster has no job of that ID."""
        with self._translated():
            try:
                return _job(self._connected().get_job_info(job_id))
            except RuntimeError as error:
                if _code(error) == 404:
                    return None
                raise

    def jobs(self) -> list[Job]:
        """List every submitted job that the cluster remembers, newest last."""
        with self._translated():
            jobs = [
                _job(details) for details in self._connected().list_jobs() if details.submission_id
            ]
        return sorted(jobs, key=lambda job: (job.started or 0.0, job.id))

    def submit(self, **request: Any) -> None:
        """Upload the job and start it; raise AlreadyThere if a job of that ID exists."""
        with self._translated():
            try:
                self._connected().submit_job(**request)
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise AlreadyThere(
                        f"there is a job {request['submission_id']} already"
                    ) from None
                raise

    def stop(self, job_id: str) -> None:
        with self._translated():
            self._connected().stop_job(job_id)

    def log(self, job_id: str) -> str:
        """Return the job's output so far.

        The log is empty before the job has started, and when the node that holds it is gone.
        """
        with self._translated():
            try:
                return cast(str, self._connected().get_job_logs(job_id) or "")
            except RuntimeError as error:
                # 500: the node that has the log does not answer.
                if _code(error) in (400, 404, 500):
                    return ""
                raise

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """Yield the log from its beginning, as it grows, until the job is over."""
        with self._translated():
            async for text in self._connected().tail_job_logs(job_id):
                yield text

    def _connected(self) -> JobSubmissionClient:
        if self._client is None:
            self.connect()
        return self._client

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except OrchestratorError:
            raise
        except AuthenticationError as error:
            raise self._locked(str(error)) from None
        except (TimeoutError, requests.RequestException, aiohttp.ClientError, OSError) as error:
            raise self._silent(_reason(error)) from None
        # The server that answers is not Ray, or has a problem.
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise self._silent(last_line(error)) from None

    def _locked(self, text: str) -> BadInput:
        problem = (
            "refuses the token" if text.startswith("Authentication failed") else "asks for a token"
        )
        return BadInput(
            f"the cluster at {self.shown} {problem}",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file; on the head, "
            "`ray get-auth-token` prints it",
        )

    def _silent(self, reason: str) -> Unreachable:
        return Unreachable(
            f"no Ray cluster answers at {self.shown}: {reason}",
            f"give --address the dashboard of the cluster's head, such as {DEFAULT_ADDRESS}; "
            "on Kubernetes forward its port: kubectl port-forward service/NAME-head-svc 8265",
        )


def checked_address(text: str) -> str:
    """Return the address without a final slash; raise BadInput unless it is a dashboard's."""
    parts = urlsplit(text)
    try:
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and (parts.port is None or parts.port)
        ):
            return text.rstrip("/")
    except ValueError:  # the port is not valid
        pass
    host = re.sub(r"^\w+://|:.*$", "", text) or "HOST"
    is_host = re.fullmatch(r"[\w.-]+", host) and host not in ("auto", "local")
    example = f"http://{host if is_host else 'HOST'}:8265"
    raise BadInput(
        f"{_shown(text)!r} is not the address of a dashboard, to which jobs are submitted",
        f"give --address {example} (RAY_API_SERVER_ADDRESS and RAY_ADDRESS are read too)",
    )


def _shown(text: str) -> str:
    """Mask an address that may lack its scheme."""
    if "://" in text:
        return mask_secrets(text)
    return mask_secrets(f"http://{text}").removeprefix("http://")


def token(environment: Mapping[str, str]) -> str | None:
    """Return the cluster's token, which is looked up as Ray does it.

    The token in the home folder belongs to this machine's own Ray, and is only sent when
    RAY_AUTH_MODE asks for it. Raises BadInput for a file that can't be read.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    if not path and environment.get("RAY_AUTH_MODE", "").lower() == "token":
        default_path = Path.home() / ".ray" / "auth_token"
        path = str(default_path) if default_path.is_file() else None
    if not path:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise BadInput(
            f"RAY_AUTH_TOKEN_PATH {path}: {reason}", "name the file that holds the token"
        ) from None


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        status=str(details.status).lower(),
        exit_code=details.driver_exit_code,
        error_type=str(getattr(details.error_type, "value", details.error_type) or ""),
        message=details.message or "",
        metadata=details.metadata or {},
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )


def _code(error: Exception) -> int | None:
    match = re.search(r"status code (\d{3})", str(error))
    return int(match[1]) if match else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _reason(error: BaseException) -> str:
    """Describe the kind of an error, because requests' own messages are chains of objects."""
    text = str(error)
    for phrase in (
        "Connection refused",
        "Name or service not known",
        "timed out",
        "No route to host",
        "CERTIFICATE",
    ):
        if phrase.lower() in text.lower():
            return (
                phrase
                if phrase != "CERTIFICATE"
                else "its certificate is not trusted on this machine"
            )
    if isinstance(error, ConnectionError) and text.startswith("Failed to connect"):
        return "nothing listens on that port"
    return type(error).__name__
