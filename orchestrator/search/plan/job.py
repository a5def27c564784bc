"""The estimate of a job's costs, before it is run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.session import ray_beside
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry
from orchestrator.search.inputs import Inputs, check_inputs
from orchestrator.search.plan.plan import Plan, make_plan
from orchestrator.search.prepare import prepare_job
from orchestrator.search.progress import Clock
from orchestrator.search.workers.prestart import make_ready
from orchestrator.search.workers.running import place_search


def plan_job(
    job: JobSpec,
    say: Callable[[str], None],
    address: str | None = None,
    verbose: bool = False,
    inputs: Inputs | None = None,
) -> Plan:
    """Estimate the time and memory that the job will take, and keep nothing.

    A cluster is only asked for its nodes. Steps and evaluations are measured on this machine. The
    start of the search is rehearsed only if the search would run on this machine.

    Raises OrchestratorError; it is BadInput for a job that ``run_job`` would refuse.
    """
    inputs = inputs or check_inputs(job)
    clock = Clock.after(inputs.seconds)
    elsewhere = bool(address or os.environ.get("RAY_ADDRESS"))
    with (
        ray_beside(address, verbose, make_ready, job.resources.niceness) as ray_up,
        tempfile.TemporaryDirectory(prefix="plan-") as folder,
    ):
        say("reading data and base model")
        prepared, _ = prepare_job(job, Registry(), clock, rows=inputs.rows)
        say("asking the cluster for its nodes" if elsewhere else "starting Ray")
        ray_up()
        clock.mark("ray")
        placement = place_search(prepared)
        say("measuring the start, steps and evaluations")
        rehearsal = None if elsewhere else Path(folder)
        return make_plan(prepared, placement, nodes(), clock.before(), rehearsal)
