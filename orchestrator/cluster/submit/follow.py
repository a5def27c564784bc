"""Following a job's log to the end of the job, however often the connection breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from orchestrator.cluster.submit.job_server import Cluster, Job
from orchestrator.cluster.submit.outcome import visible
from orchestrator.errors import JobFailed, Unreachable

LOOK_S = 10.0  # the interval of checks of the job itself: a connection may die silently
AGAIN_S = 1.0


class Forgotten(JobFailed):
    """The cluster no longer knows the job, because it was started anew."""


class Lines:
    """The lines of a log that is read again from its beginning after each lost connection.

    Each line is shown once.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._seen = 0  # characters that were shown or are in ``_rest``
        self._position = 0
        self._rest = ""

    def from_the_start(self) -> None:
        self._position = 0

    def add(self, text: str) -> None:
        unseen = text[max(0, self._seen - self._position) :]
        self._position += len(text)
        self._seen = max(self._seen, self._position)
        *complete_lines, self._rest = (self._rest + unseen).split("\n")
        for line in complete_lines:
            self._one(line)

    def end(self) -> None:
        if self._rest:
            self._one(self._rest)
        self._rest = ""

    def _one(self, line: str) -> None:
        if visible(line):
            self._show(line)


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None], patience_s: float) -> Job:
    """Show the log until the job is over, and return the ended job.

    Raises Forgotten when the cluster no longer knows the job, and Unreachable when there was no
    answer for ``patience_s``.
    """
    lines = Lines(show)
    silent_since: float | None = None
    while True:
        try:
            with suppress(Unreachable):  # the log may be unreachable although the job is not
                asyncio.run(_read(cluster, job_id, lines))
            job = cluster.job(job_id)
            silent_since = None
        except Unreachable:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > patience_s:
                raise
        else:
            if job is None:
                raise Forgotten(f"the cluster at {cluster.shown} knows no job {job_id}")
            if job.is_over:
                lines.end()
                return job
        time.sleep(AGAIN_S)


async def _read(cluster: Cluster, job_id: str, lines: Lines) -> None:
    """Read to the log's end, or until the job is over and no more text comes."""
    lines.from_the_start()

    async def read() -> None:
        async for text in cluster.tail(job_id):
            lines.add(text)

    reading = asyncio.create_task(read())
    over = False
    try:
        while not (await asyncio.wait([reading], timeout=LOOK_S))[0]:
            if over:
                return
            job = await asyncio.to_thread(cluster.job, job_id)
            over = job is None or job.is_over  # the rest of the log comes in the next interval
        await reading
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError, Unreachable):
            await reading
