"""A job as a Ray job: packed, submitted, followed, stopped.

``search/submitted.py`` is the cluster's side of it.
"""

from orchestrator.cluster.submit.follow import follow
from orchestrator.cluster.submit.job_server import DEFAULT_ADDRESS, Cluster, Job
from orchestrator.cluster.submit.outcome import result_line, visible
from orchestrator.cluster.submit.package import LABELS, SEARCH, unpacked
from orchestrator.cluster.submit.request import LABEL_PREFIX, NAME_KEY, SEARCH_KEY, USER_KEY
from orchestrator.cluster.submit.submit import (
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
