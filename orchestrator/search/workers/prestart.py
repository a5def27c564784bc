"""Processes that are started early for a search's worker, in a Ray that was started here.

A search needs a chain of Ray processes, each requested by the one before it. Each process imports
what Train or Tune need. Ray's processes import this module as they start, and with it those
libraries. They are made here while the driver reads data and model, which keeps one core busy, and
Ray hands them out when they are requested. The processes of trials are not made early: they start
while the worker loads the model, and earlier they would delay it.
"""

from __future__ import annotations

import orchestrator.search.study.study
import orchestrator.search.workers.train_group  # noqa: F401
from orchestrator.cluster.ray_internals.core import prestart

PROCESSES = 4  # the broker, Train's controller, its actor that keeps reports, and the worker


def make_ready() -> None:
    """Have Ray start the processes that are missing; returns without waiting for them."""
    prestart(PROCESSES)
