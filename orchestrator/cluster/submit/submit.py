"""The implementation of ``orchestrator submit``.

It packs a job, submits it or finds its earlier submission, follows its log, and submits it again
when it was lost.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.cluster.submit.environment import forwarded
from orchestrator.cluster.submit.follow import Forgotten, follow
from orchestrator.cluster.submit.job_server import DEFAULT_ADDRESS, AlreadyThere, Cluster, Job
from orchestrator.cluster.submit.outcome import failure, is_lost, result_in
from orchestrator.cluster.submit.package import code_files, pack, write_files
from orchestrator.cluster.submit.request import (
    ENTRYPOINT,
    SEARCH_KEY,
    STOP_SECONDS,
    SubmitRequest,
    parse_labels,
    read_pip,
)
from orchestrator.errors import BadInput, Interrupted, Unreachable
from orchestrator.job.spec import JobSpec
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.object_store import check_address, is_address

PATIENCE_S = 60.0  # the time to wait for a cluster that does not answer
RETURN_S = 600.0  # the same if the job may be submitted again: a new head takes minutes
PAUSE_S = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """A request, its cluster, and the number of times to submit it again."""

    request: SubmitRequest
    cluster: Cluster
    retries: int = 0

    @property
    def patience_s(self) -> float:
        return RETURN_S if self.retries else PATIENCE_S

    def document(self) -> JsonObject:
        """Build the document that ``--dry-run`` shows."""
        return {
            **self.request.document(self.cluster.address),
            "retries": self.retries,
            "notes": warnings(self),
        }


def make_submission(
    job: JobSpec,
    address: str | None,
    *,
    retries: int = 0,
    home: str | None = None,
    shared: Sequence[Path] = (),
    asked: Sequence[str] = (),
    pip: Path | None = None,
    image_has_code: bool = False,
    labels: Sequence[str] = (),
    cpus: float = 0.0,
) -> Submission:
    """Check everything that can be checked without the cluster, and build the submission.

    Raises BadInput.
    """
    if home is not None and is_address(home):
        check_address(home, "--home")
    elif home is not None and not Path(home).is_absolute():
        raise BadInput(
            f"--home {home} is not an absolute path",
            "name a folder on the cluster, such as /mnt/searches, or s3://BUCKET/FOLDER",
        )
    missing = [str(folder) for folder in shared if not folder.is_dir()]
    if missing:
        raise BadInput(
            f"--shared {missing[0]} is not a folder on this machine",
            "name a folder that exists under the same path on this machine and on the nodes",
        )
    request = SubmitRequest(
        package=pack(job, shared),
        code=() if image_has_code else code_files(),
        environment=forwarded(os.environ, asked),
        pip=read_pip(pip),
        home=home,
        labels=parse_labels(labels),
        cpus=cpus,
    )
    return Submission(request, Cluster(address), retries)


def warnings(submission: Submission) -> list[str]:
    """List the aspects of a submission that the user may not have intended."""
    request, notes = submission.request, list(submission.request.environment.notes)
    if submission.retries and request.home is None:
        notes.append(
            "without --home a search is kept on its driver's node: lost with that, it begins again"
        )
    if urlsplit(submission.cluster.address).hostname not in LOOPBACK:
        for name, value in request.environment.public.items():
            if urlsplit(value).hostname in LOOPBACK or value.startswith("sqlite:"):
                notes.append(
                    f"{name}={value} means the node that the driver runs on, and not this machine"
                )
    return notes


@dataclass(frozen=True)
class Attempt:
    """A job on the cluster: submitted by this command, or found there."""

    id: str
    search: str
    found: bool

    def document(self, cluster: Cluster) -> JsonObject:
        return {
            "id": self.id,
            "search": self.search,
            "address": cluster.shown,
            "attached": self.found,
        }


def submit_job(submission: Submission, say: Say, show: Say, wait: bool = True) -> JsonObject:
    """Submit and follow the job to its end; return the document of ``submit --json``.

    Without ``wait``, returns once the cluster has the job. Raises an error with the job's own exit
    code, or Interrupted when this command itself was interrupted, which does not stop the job.
    """
    cluster = submission.cluster
    for note in warnings(submission):
        say(note)
    for path in submission.request.package.elsewhere:
        say(f"{path} is not packed: the cluster has to have it")
    for note in cluster.connect():
        say(note)
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        return _attempts(
            submission, _Folders.written(submission.request, Path(folder)), say, show, wait
        )


@dataclass(frozen=True)
class _Folders:
    """The folders that Ray uploads."""

    job: Path
    code: Path

    @classmethod
    def written(cls, request: SubmitRequest, folder: Path) -> _Folders:
        request.package.write(folder / "job")
        write_files(request.code, folder / "code")
        return cls(folder / "job", folder / "code" / "orchestrator")


def _attempts(
    submission: Submission, folders: _Folders, say: Say, show: Say, wait: bool
) -> JsonObject:
    cluster = submission.cluster
    search: str | None = None  # the previous attempt's search
    for retries_left in reversed(range(submission.retries + 1)):
        begin = partial(_begin, submission, folders, search)
        attempt = _patiently(begin, submission.patience_s if search else 0.0)
        say(
            f"job {attempt.id} {'is under way already' if attempt.found else 'is submitted'} "
            f"to {cluster.shown}"
        )
        if not wait:
            return {
                **attempt.document(cluster),
                "status": "attached" if attempt.found else "submitted",
            }
        search = attempt.search
        say(
            "following its log (Ctrl-C leaves it running; "
            f"orchestrator stop {attempt.id}{_option(cluster)} ends it)"
        )
        job = _followed(cluster, attempt.id, show, submission.patience_s)
        if retries_left and (job is None or is_lost(job)):
            say(
                f"job {attempt.id} was lost; submitting it again ({retries_left} "
                f"{'retry' if retries_left == 1 else 'retries'} left)"
            )
            continue
        return attempt.document(cluster) | concluded(cluster, attempt.id, job)
    raise AssertionError("the last attempt returns or raises")


def _followed(cluster: Cluster, job_id: str, show: Say, patience_s: float) -> Job | None:
    """Follow the job to its end and return it; None when the cluster no longer knows it."""
    goes_on = f"orchestrator logs {job_id} --follow{_option(cluster)}"
    try:
        return follow(cluster, job_id, show, patience_s)
    except Forgotten:
        return None
    except Unreachable as error:
        raise Unreachable(
            f"{error.message}; job {job_id} may be running", f"{goes_on} picks up"
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(f"left job {job_id} running", goes_on) from None


def concluded(cluster: Cluster, job_id: str, job: Job | None) -> JsonObject:
    """Return the outcome of a job that was followed to its end.

    Raises an error with the job's own exit code.
    """
    if job is None:
        raise Forgotten(
            f"job {job_id} was lost: the cluster at {cluster.shown} was started anew "
            "and does not know it",
            "the same orchestrator submit goes on, if --home outlived the cluster",
        )
    log = cluster.log(job_id)
    if job.status != "succeeded":
        raise failure(job, log)
    return {"status": "succeeded", "result": result_in(log)}


def followed_document(cluster: Cluster, job_id: str, show: Say) -> JsonObject:
    """Follow a job's log to its end, as ``submit`` would have done.

    Raises the same errors as ``submit_job``.
    """
    return {
        "id": job_id,
        **concluded(cluster, job_id, _followed(cluster, job_id, show, PATIENCE_S)),
    }


def _begin(submission: Submission, folders: _Folders, search: str | None) -> Attempt:
    """Return the newest attempt if it has not ended; otherwise submit the next attempt."""
    request, cluster = submission.request, submission.cluster
    for _ in range(5):  # another program may submit the same job at the same time
        is_active, attempt = next_attempt(request.base_id, cluster.jobs(), search)
        if is_active:
            return attempt
        try:
            cluster.submit(
                entrypoint=ENTRYPOINT,
                submission_id=attempt.id,
                runtime_env=request.runtime_env(attempt.search, folders.job, folders.code),
                metadata=request.metadata(attempt.search),
                entrypoint_num_cpus=request.cpus or None,
            )
            return attempt
        except AlreadyThere:
            time.sleep(PAUSE_S)
    raise Unreachable(
        f"the cluster at {cluster.shown} does not take job {request.base_id}", "try again"
    )


def next_attempt(base: str, jobs: Sequence[Job], search: str | None = None) -> tuple[bool, Attempt]:
    """Return the attempt that is under way, or else the next attempt to submit.

    The first value tells whether it is under way. An attempt continues the search of the previous
    attempt, unless that attempt succeeded: then it begins a search of its own. ``search`` is the
    search to continue when the cluster does not know any attempt.
    """
    pattern = re.compile(rf"{re.escape(base)}(?:-([2-9]|[1-9]\d+))?")
    numbered = [(int(match[1] or 1), job) for job in jobs if (match := pattern.fullmatch(job.id))]
    if not numbered:
        return False, Attempt(base, search or base, False)
    number, last = max(numbered, key=lambda pair: pair[0])
    of_last = last.metadata.get(SEARCH_KEY, base)
    if not last.is_over:
        return True, Attempt(last.id, of_last, True)
    following = f"{base}-{number + 1}"
    return False, Attempt(following, following if last.status == "succeeded" else of_last, False)


def _patiently(call: Callable[[], Attempt], seconds: float) -> Attempt:
    """Return the call's result; repeat the call for ``seconds`` while no cluster answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Unreachable:
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE_S)


def stop_job(cluster: Cluster, job_id: str) -> tuple[bool, Job]:
    """Stop a job and wait until it has stopped.

    Returns whether it was under way, and the job as it is now. Raises BadInput for an unknown ID,
    and Unreachable when the job does not end.
    """
    job = known_job(cluster, job_id)
    if job.is_over:
        return False, job
    cluster.stop(job_id)
    until = time.monotonic() + float(STOP_SECONDS) + PATIENCE_S
    while time.monotonic() < until:
        if (job := known_job(cluster, job_id)).is_over:
            return True, job
        time.sleep(PAUSE_S)
    raise Unreachable(
        f"job {job_id} was asked to stop and is still running", f"orchestrator logs {job_id}"
    )


def known_job(cluster: Cluster, job_id: str) -> Job:
    """Return the job of that ID; raise BadInput that lists the newest jobs if it is unknown."""
    if job := cluster.job(job_id):
        return job
    newest = [job.id for job in reversed(cluster.jobs())][:5]
    hint = "it has no jobs; orchestrator submit JOB makes one"
    if newest:
        hint = f"jobs there: {', '.join(newest)}"
    raise BadInput(f"the cluster at {cluster.shown} knows no job {job_id!r}", hint)


def _option(cluster: Cluster) -> str:
    """Return the option that names the cluster in the next command.

    It is empty for the default cluster.
    """
    return "" if cluster.address == DEFAULT_ADDRESS else f" --address {shlex.quote(cluster.shown)}"
