"""Verbs that tune: check, plan, run and resume a job, and report on its search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import (
    console_progress,
    present_search,
    progress_line,
    read_checked,
    read_job,
    repeated,
)
from orchestrator.cli.groups import TUNE, verb
from orchestrator.cli.options import Address, Job, Json, Overrides, Quiet, Verbose
from orchestrator.cli.output import present, print_json, results_only
from orchestrator.utils.garbage import uncollected


@verb(TUNE)
def doctor(as_json: Json = False) -> None:
    """Check this machine, and say how to fix what is missing.

    The exit code is 3 when something is missing.
    """
    from orchestrator.cli.doctor import examine

    findings = examine()
    sound = all(finding.ok for finding in findings)
    next_steps = ["next: orchestrator demo   or   orchestrator init"] if sound else []
    document = [finding.document() for finding in findings]
    present(document, as_json, lambda: [*map(str, findings), *next_steps])
    if not sound:
        raise typer.Exit(3)


@verb(TUNE)
def demo() -> None:
    """Run the quickstart from end to end in build/demo.

    Tunes, registers, serves and queries a prompt, all on this machine.
    """
    from orchestrator.cli.demo import main

    raise typer.Exit(main())


@verb(TUNE)
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; made if it is missing.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Write a commented job spec and some rows of data to start from."""
    from orchestrator.cli.init import next_steps, write_starter

    written = write_starter(folder)
    steps = next_steps(folder)
    document = {"files": [str(file.absolute()) for file in written], "next": steps}
    lines = [f"wrote {file}" for file in written]
    present(document, as_json, lambda: [*lines, f"next: {' && '.join(steps)}"])


@verb(TUNE)
def validate(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    spec_only: Annotated[
        bool,
        typer.Option(
            "--spec-only", help="Check the spec alone, not the files and folders it names."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a job spec, and the files and folders that it names.

    Reports all problems at once, each with its line.
    """
    from orchestrator.job.space import trial_count
    from orchestrator.utils.wording import counted

    warnings: tuple[str, ...] = ()
    if spec_only:
        spec = read_job(job, overrides)
        unchecked = [{"key": "", "reason": "files and folders are not looked at with --spec-only"}]
    else:
        spec, inputs = read_checked(job, overrides)
        unchecked = [{"key": each.key, "reason": each.reason} for each in inputs.unchecked]
        warnings = inputs.warnings
    document = {"valid": True, "spec": spec.model_dump(mode="json")}
    document |= {"not_checked": unchecked, "warnings": list(warnings)}
    trials = counted(trial_count(spec.search), "trial")
    lines = [
        f"{job}: sound. {', '.join(spec.methods)} of {spec.base_model.id}, {trials}.",
        *(
            f"not checked: {each['key']}{': ' if each['key'] else ''}{each['reason']}"
            for each in unchecked
        ),
        *(f"warning: {warning}" for warning in warnings),
        f"next: orchestrator run {job}{repeated(overrides)}",
    ]
    present(document, as_json, lambda: lines)


@verb(TUNE)
def plan(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a few real steps, and estimate the search's costs.

    The estimate covers time, memory and device hours. Nothing is kept.
    """
    spec, inputs = read_checked(job, overrides)
    with results_only():
        with uncollected():
            from orchestrator.search.plan.job import plan_job

        made = plan_job(spec, progress_line(quiet, "{} ..."), address, verbose, inputs)
    from orchestrator.cli.pages.search import plan_page

    next_step = f"next: orchestrator run {job}{repeated(overrides)}"
    present(made.document(), as_json, lambda: [*plan_page(made, spec), next_step])


@verb(TUNE)
def run(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Address = None,
    planned: Annotated[
        bool, typer.Option("--plan", help="Measure first; the estimate is kept in MLflow.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the search, and register its best prompt.

    The best prompt becomes champion if there is none yet, or if it beats the current champion.
    """
    spec, inputs = read_checked(job, overrides)
    with results_only():
        with uncollected():
            from orchestrator.cli.python.searches import run_checked

            progress = console_progress(quiet)
        result = run_checked(spec, inputs, progress(spec), address, verbose, planned)
    present_search(result.document, spec, as_json)


@verb(TUNE)
def resume(
    search: Annotated[
        str,
        typer.Argument(
            help="Id of a search, its beginning, its folder, or latest.", show_default=False
        ),
    ],
    address: Address = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a search that ended early.

    It may have been interrupted or killed, or have lost MLflow.
    """
    with results_only():
        with uncollected():
            from orchestrator.cli.python.searches import resume_saved

            progress = console_progress(quiet)
        result = resume_saved(search, progress, address, verbose)
    present_search(result.document, result.job, as_json)


@verb(TUNE)
def report(
    searches: Annotated[
        list[str],
        typer.Argument(
            metavar="SEARCH...",
            help="Ids of searches, their beginnings, their folders, or latest.",
            show_default=False,
        ),
    ],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to; report.html in the search's folder."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--log/--no-log", help="Log it to the search's MLflow run too.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write an HTML page about a search, or compare several searches.

    The page is self-contained, with tables and plots. For several searches, the best trial of each
    is printed, side by side; --out writes that comparison as a page too.
    """
    if len(searches) > 1:
        return _compared(searches, out_file, as_json)
    (search,) = searches
    with results_only():
        from orchestrator.cli.python.searches import load_search

        found = load_search(search)
        file = found.report(out_file, log=keep).file
    document = {"search": found.id, "file": str(file.absolute()), "logged": keep}
    present(document, as_json, lambda: [_open_page(file)])


def _compared(searches: list[str], out_file: Path | None, as_json: bool) -> None:
    """Print the best trial of each search and its costs; write them as a page if asked to."""
    with results_only():
        from orchestrator.cli.pages.table import table
        from orchestrator.search.report import (
            comparison,
            comparison_page,
            comparison_rows,
            read_facts,
        )
        from orchestrator.search.report.comparison import HEADING
        from orchestrator.search.state.saved import find_search
        from orchestrator.utils.atomic import write_whole

        document = comparison([read_facts(find_search(search)) for search in searches])
        if out_file:
            write_whole(out_file, comparison_page(document).encode())
    lines = [
        *table(HEADING, comparison_rows(document)),
        *(f"warning: {text}" for text in document["warnings"]),
    ]
    if out_file:
        document = document | {"file": str(out_file.absolute())}
        lines.append(_open_page(out_file))
    present(document, as_json, lambda: lines)


def _open_page(file: Path) -> str:
    return f"{file}: open it in a browser; it needs no network."


@verb(TUNE)
def schema() -> None:
    """Print the JSON schema of the job spec, for editors."""
    from orchestrator.job.spec import job_schema

    print_json(job_schema())
