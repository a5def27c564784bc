"""Jobs on a cluster, and the request that would submit one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.cli.pages.table import aligned, table
from orchestrator.cli.progress import duration
from orchestrator.cluster.submit import LABEL_PREFIX, NAME_KEY, SEARCH_KEY, USER_KEY, Job
from orchestrator.utils.documents import JsonObject


def jobs_document(jobs: Sequence[Job]) -> list[JsonObject]:
    """Return the document of ``jobs --json``."""
    return [
        {
            "id": job.id,
            "status": job.status,
            "name": job.metadata.get(NAME_KEY),
            "search": job.metadata.get(SEARCH_KEY),
            "user": job.metadata.get(USER_KEY),
            "labels": _labels(job),
            "submitted": _moment(job.started),
            "ended": _moment(job.ended),
            "seconds": None if job.seconds is None else round(job.seconds, 3),
            "exit_code": job.exit_code,
        }
        for job in jobs
    ]


def jobs_table(jobs: Sequence[Job]) -> list[str]:
    """Format the jobs as a table, with the next step."""
    if not jobs:
        return [
            "no job was submitted to this cluster",
            "next: orchestrator submit JOB --address URL",
        ]
    rows = [
        (
            job.id,
            job.status,
            f"{_moment(job.started) or '':.16}".replace("T", " "),
            "" if job.seconds is None else duration(job.seconds),
            job.metadata.get(USER_KEY, ""),
            " ".join(f"{name}={value}" for name, value in _labels(job).items()),
        )
        for job in jobs
    ]
    return [
        *table(("job", "status", "submitted (UTC)", "took", "by", "labels"), rows),
        "next: orchestrator logs JOB --follow   or   orchestrator stop JOB",
    ]


def _labels(job: Job) -> dict[str, str]:
    found = job.metadata.items()
    return {
        name.removeprefix(LABEL_PREFIX): value
        for name, value in found
        if name.startswith(LABEL_PREFIX)
    }


def _moment(seconds: float | None) -> str | None:
    return (
        None
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    )


def request_page(document: Mapping[str, Any]) -> list[str]:
    """Format what ``submit`` would send, for ``--dry-run``."""
    environment = document["runtime_env"]
    code = environment["py_modules"]
    facts: list[tuple[str, str]] = [
        ("to", document["address"]),
        ("job", document["submission_id"]),
        ("runs", document["entrypoint"]),
        *(
            ("packs", f"{file['from']} as {file['name']}, {file['bytes']} bytes")
            for file in environment["working_dir"]
        ),
        (
            "code",
            f"{code['orchestrator']} files of this orchestrator"
            if code
            else "the one of the cluster's image",
        ),
        *(("needs there", path) for path in document["on_the_cluster"]),
        *(("installs", line) for line in environment["pip"] or ()),
        *(("sets", f"{name}={value}") for name, value in environment["env_vars"].items()),
        *(("says", f"{name}={value}") for name, value in document["metadata"].items()),
        *(("note", text) for text in document["notes"]),
    ]
    return [*aligned(facts), "nothing was sent"]
