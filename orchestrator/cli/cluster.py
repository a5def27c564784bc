"""Verbs that run jobs on a cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.common import console_progress, progress_line, read_checked
from orchestrator.cli.groups import CLUSTER, app, verb
from orchestrator.cli.options import Dashboard, Job, JobId, Json, Overrides, Quiet
from orchestrator.cli.output import out, present, results_only, say
from orchestrator.errors import OrchestratorError


@verb(CLUSTER)
def submit(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Dashboard = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log, and exit with the outcome.")
    ] = True,
    retries: Annotated[
        int, typer.Option(min=0, help="Submit again so often when the job or its cluster is lost.")
    ] = 0,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The cluster's folder for searches, or s3://...; one that outlives its nodes.",
        ),
    ] = None,
    shared: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="Folder that the nodes have too: not packed; repeatable."),
    ] = [],  # noqa: B006
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME[=VALUE]", help="Environment variable of the job; repeatable."),
    ] = [],  # noqa: B006
    pip: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Install these packages for the job, where the image has not."
        ),
    ] = None,
    image_has_code: Annotated[
        bool,
        typer.Option(
            "--image-has-code", help="Run the code of the cluster's image, not this one's."
        ),
    ] = False,
    label: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="For attributing costs; repeatable.")
    ] = [],  # noqa: B006
    cpus: Annotated[
        float,
        typer.Option(
            "--entrypoint-num-cpus",
            min=0,
            help="Reserve so many for the driver, on any node; 0: the head.",
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the request; ask nobody, send nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack a job with its files, and run it on a cluster.

    Submitting the same job again attaches to it while it runs. If it failed or was stopped, a new
    attempt continues its search.
    """
    spec, _ = read_checked(job, overrides, elsewhere=True)
    with results_only():
        from orchestrator.cluster.submit import make_submission, submit_job

        made = make_submission(
            spec, address, retries=retries, home=home, shared=shared, asked=env, pip=pip,
            image_has_code=image_has_code, labels=label, cpus=cpus,
        )  # fmt: skip
        document = made.document() if dry_run else submit_job(made, say, progress_line(quiet), wait)
    if dry_run:
        from orchestrator.cli.pages.cluster import request_page

        return present(document, as_json, lambda: request_page(document))
    if wait:
        return present(document, as_json, lambda: _summary(document))
    job_id = shlex.quote(document["id"])
    next_step = f"next: orchestrator logs {job_id} --follow   or   orchestrator stop {job_id}"
    present(document, as_json, lambda: [document["id"]], aside=next_step)


def _summary(document: dict[str, Any]) -> list[str]:
    """Return the lines that the job printed at its end."""
    return list(document["result"].get("summary", []))


@verb(CLUSTER)
def jobs(address: Dashboard = None, as_json: Json = False) -> None:
    """List the jobs that were submitted to a cluster, newest last."""
    from orchestrator.cluster.submit import Cluster

    with results_only():
        found = Cluster(address).jobs()
    from orchestrator.cli.pages.cluster import jobs_document, jobs_table

    present(jobs_document(found), as_json, lambda: jobs_table(found))


@verb(CLUSTER)
def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="To the job's end; exits with its outcome.")
    ] = False,
    address: Dashboard = None,
    as_json: Json = False,
) -> None:
    """Print what a submitted job has logged so far."""
    from orchestrator.cluster.submit import Cluster, followed_document, known_job, visible

    seen: list[str] = []
    show = seen.append if as_json else out
    with results_only() if as_json else nullcontext():
        cluster = Cluster(address)
        status = known_job(cluster, job_id).status
        if follow:
            document = followed_document(cluster, job_id, show)
        else:
            document = {"id": job_id, "status": status}
            for line in filter(visible, cluster.log(job_id).splitlines()):
                show(line)
    present(document | {"log": seen}, as_json, lambda: _summary(document) if follow else ())


@verb(CLUSTER)
def stop(job_id: JobId, address: Dashboard = None, as_json: Json = False) -> None:
    """Stop a submitted job, and wait until it has ended.

    The job closes its MLflow runs before it ends.
    """
    from orchestrator.cluster.submit import Cluster, stop_job

    with results_only():
        stopped, found = stop_job(Cluster(address), job_id)
    document = {"id": job_id, "stopped": stopped, "status": found.status}
    state = "is stopped" if found.status == "stopped" else f"has {found.status}"
    lines = [f"job {job_id} {state}."]
    if found.status != "succeeded":
        lines.append("next: the same orchestrator submit goes on from what was kept")
    present(document, as_json, lambda: lines)


@app.command("on-cluster", hidden=True)
def on_cluster() -> None:
    """Run a submitted job on the cluster; the job's entry point calls this verb."""
    from orchestrator.cluster.submit import result_line

    try:
        with results_only():
            from orchestrator.cli.pages.search import run_summary
            from orchestrator.search.submitted import carry_out

            document, spec = carry_out(console_progress())
            document["summary"] = run_summary(document, spec)
    except OrchestratorError as error:
        out(
            result_line(
                {
                    "error": {
                        "message": error.message,
                        "next": error.hint,
                        "exit_code": error.exit_code,
                    }
                }
            )
        )
        raise
    out(result_line(document))
