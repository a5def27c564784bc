"""The outcome of a job: the document at the end of its log, or the reason of its failure."""

from __future__ import annotations

import json
import re

from orchestrator.cluster.submit.job_server import Job
from orchestrator.errors import BadInput, Interrupted, JobFailed, OrchestratorError, Unreachable
from orchestrator.utils.documents import JsonObject

MARK = "@orchestrator-result "  # begins the log line that only programs read
KINDS: dict[int, type[OrchestratorError]] = {
    BadInput.exit_code: BadInput,
    Unreachable.exit_code: Unreachable,
    Interrupted.exit_code: Interrupted,
}
KILLED = (137, 143)  # exit codes that shells use for SIGKILL and SIGTERM
LOST = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
)
MISSING = re.compile(r"No module named '?([A-Za-z_][\w.]*)")


def result_line(document: JsonObject) -> str:
    """Return a line that carries a document through a job's log."""
    return MARK + json.dumps(document, default=str)


def visible(line: str) -> bool:
    return not line.startswith(MARK)


def result_in(log: str) -> JsonObject:
    """Return the last document in a log; empty if there is none."""
    for line in reversed(log.splitlines()):
        if not visible(line):
            try:
                document = json.loads(line.removeprefix(MARK))
            except ValueError:  # the line was cut off
                continue
            return document if isinstance(document, dict) else {}
    return {}


def is_lost(job: Job) -> bool:
    """Tell whether the job was killed or lost its node, so that another attempt may continue it."""
    if job.status != "failed":
        return False
    return job.error_type in LOST or (
        job.exit_code is not None and (job.exit_code < 0 or job.exit_code in KILLED)
    )


def failure(job: Job, log: str) -> OrchestratorError:
    """Return the error for a job that ended without a result; it has the job's exit code."""
    reported = result_in(log).get("error") or {}
    logs_command = f"orchestrator logs {job.id}"
    if job.status == "stopped":
        return Interrupted(f"job {job.id} was stopped", "the same orchestrator submit")
    if is_lost(job):
        how = "was killed" if job.exit_code is not None else "died with its node"
        return JobFailed(
            f"job {job.id} was lost: its driver {how}",
            "run the same orchestrator submit again: it continues from the saved state",
        )
    if explanation := _known(job, log):
        return JobFailed(f"job {job.id} failed: {explanation[0]}", explanation[1])
    text = reported.get("message") or _last_line(job, log)
    kind = KINDS.get(job.exit_code or 1, JobFailed)
    return kind(f"job {job.id} failed: {text}", reported.get("next") or logs_command)


def _known(job: Job, log: str) -> tuple[str, str] | None:
    """Explain failures that the job itself could not report.

    They came before the job started, or in the middle of an import.
    """
    if job.error_type == "RUNTIME_ENV_SETUP_FAILURE":
        return (
            f"its environment could not be set up: {_last_line(job, job.message)}",
            "see `orchestrator logs`; packages of --pip come from an index that the cluster's "
            "nodes must reach: where they can't, build them into the image and leave --pip out",
        )
    if job.error_type == "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE":
        return (
            "no node has room for its driver",
            "lower --entrypoint-num-cpus, or wait until CPUs are free",
        )
    if job.exit_code in (126, 127):
        return (
            "its node has no `python` to run",
            "put the image's Python on the PATH of its containers",
        )
    if missing_packages := MISSING.findall(log or job.message):
        name = missing_packages[-1].split(".")[0]
        code = ", or submit without --image-has-code" if name == "orchestrator" else ""
        return (
            f"the image of the cluster's nodes lacks the Python package {name}",
            f"build it into the image, or install it for this job with --pip FILE{code}",
        )
    return None


def _last_line(job: Job, log: str) -> str:
    lines = [
        line.strip() for line in (log or job.message).splitlines() if line.strip() and visible(line)
    ]
    return lines[-1][:300] if lines else "it said nothing"
