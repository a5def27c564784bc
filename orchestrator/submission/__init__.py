"""A job as a Ray job: packed, submitted, followed, stopped. The cluster's side of it is ``on_cluster.py``."""

from orchestrator.submission.cluster import DEFAULT_ADDRESS, Cluster, Job
from orchestrator.submission.follow import follow
from orchestrator.submission.outcome import result_line, visible
from orchestrator.submission.package import LABELS, SEARCH, unpacked
from orchestrator.submission.request import LABEL_PREFIX, NAME_KEY, SEARCH_KEY, USER_KEY
from orchestrator.submission.submit import (
    Submission,
    followed_document,
    known_job,
    make_submission,
    stop_job,
    submit_job,
)

__all__ = [
    "Submission", "make_submission", "submit_job", "followed_document", "known_job", "stop_job", "follow",
    "Cluster", "Job", "DEFAULT_ADDRESS",
    "NAME_KEY", "SEARCH_KEY", "USER_KEY", "LABEL_PREFIX",
    "unpacked", "result_line", "visible", "SEARCH", "LABELS",
]  # fmt: skip
