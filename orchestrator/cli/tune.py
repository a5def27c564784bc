"""Verbs that tune: check a job, run it, go on with it, report on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.groups import app
from orchestrator.cli.options import Address, Job, Json, Overrides, Quiet, Verbose
from orchestrator.cli.output import _lines, _repeated, out, print_json, results_only, say
from orchestrator.importing import uncollected


@app.command()
def validate(job: Job, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Check a job spec: every problem at once, each with its line."""
    from orchestrator.job_file import load_job
    from orchestrator.space import trials

    spec = load_job(job, overrides)
    if as_json:
        return print_json({"valid": True, "spec": spec.model_dump(mode="json")})
    out(f"{job}: sound. {spec.method} of {spec.base_model.id}, {len(trials(spec.search))} trials.")
    out(f"next: orchestrator run {job}{_repeated(overrides)}")


@app.command()
def plan(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a few real steps: what the search will take in time, memory and device hours. Nothing is kept."""
    from orchestrator.job_file import load_job

    spec = load_job(job, overrides)
    with results_only():
        with uncollected():
            from orchestrator.run import plan_job

        made = plan_job(spec, (lambda text: None) if quiet else (lambda text: say(f"{text} ...")), address, verbose)
    if as_json:
        return print_json(made.document())
    from orchestrator.cli.pages.search import plan_page

    _lines(plan_page(made, spec))
    out(f"next: orchestrator run {job}{_repeated(overrides)}")


@app.command()
def run(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Address = None,
    planned: Annotated[bool, typer.Option("--plan", help="Measure first; the estimate is kept in MLflow.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the search, register the best prompt, and promote it when it beats the champion."""
    from rich.console import Console

    from orchestrator.job_file import load_job

    spec = load_job(job, overrides)
    console = Console(stderr=True)
    with results_only():
        with uncollected():
            from orchestrator.cli.progress import ConsoleProgress
            from orchestrator.run import run_job

        document = run_job(spec, ConsoleProgress(spec, console, quiet), address, verbose, planned)
    if as_json:
        return print_json(document)
    from orchestrator.cli.pages.search import run_summary

    for line in run_summary(document, spec):
        out(line)


@app.command()
def resume(
    search: Annotated[
        str, typer.Argument(help="Id of a search, its beginning, its folder, or latest.", show_default=False)
    ],
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a search that was interrupted, killed or cut off from MLflow."""
    from rich.console import Console

    console = Console(stderr=True)
    with results_only():
        with uncollected():
            from orchestrator.cli.progress import ConsoleProgress
            from orchestrator.resume import resume_search

        document, spec = resume_search(search, lambda job: ConsoleProgress(job, console, quiet), address, verbose)
    if as_json:
        return print_json(document)
    from orchestrator.cli.pages.search import run_summary

    for line in run_summary(document, spec):
        out(line)


@app.command()
def report(
    searches: Annotated[
        list[str],
        typer.Argument(
            metavar="SEARCH...", help="Ids of searches, their beginnings, their folders, or latest.", show_default=False
        ),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to; report.html in the search's folder.")
    ] = None,
    keep: Annotated[bool, typer.Option("--log/--no-log", help="Log it to the search's MLflow run too.")] = True,
    as_json: Json = False,
) -> None:
    """One self-contained HTML page about a search, with tables and plots; several searches side by side."""
    if len(searches) > 1:
        return _compared(searches, out_file, as_json)
    (search,) = searches
    with results_only():
        from orchestrator.registry import Registry
        from orchestrator.report import read_facts, write_report
        from orchestrator.search.saved import find_search

        folder = find_search(search)
        file = out_file or folder.report
        registry = Registry() if keep else None
        if registry:
            registry.check()
        write_report(read_facts(folder), file, registry)
    if as_json:
        return print_json({"search": folder.id, "file": str(file.absolute()), "logged": keep})
    out(f"{file}: open it in a browser; it needs no network.")


def _compared(searches: list[str], out_file: Path | None, as_json: bool) -> None:
    """The best trial of each search, with what it took."""
    with results_only():
        from orchestrator.cli.pages.table import table
        from orchestrator.report import comparison, comparison_page, comparison_rows, read_facts
        from orchestrator.report.comparison import HEADING
        from orchestrator.search.saved import find_search
        from orchestrator.search.whole_file import write_whole

        document = comparison([read_facts(find_search(search)) for search in searches])
        if out_file:
            write_whole(out_file, comparison_page(document).encode())
    if as_json:
        return print_json(document | ({"file": str(out_file.absolute())} if out_file else {}))
    _lines([*table(HEADING, comparison_rows(document)), *(f"warning: {text}" for text in document["warnings"])])
    if out_file:
        out(f"{out_file}: open it in a browser; it needs no network.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what is missing, and the fix."""
    from orchestrator.cli.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.document() for finding in findings])
    else:
        for finding in findings:
            out(str(finding))
        if all(finding.ok for finding in findings):
            out("next: orchestrator run jobs/quickstart.yaml")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(3)


@app.command()
def schema() -> None:
    """JSON schema of the job spec, for editors."""
    from orchestrator.spec import job_schema

    print_json(job_schema())
