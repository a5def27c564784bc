"""The command line: thin verbs. Heavy libraries are imported inside them, so that --help answers at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from orchestrator import __version__
from orchestrator.errors import TRACEBACK, BadInput, Interrupted, OrchestratorError, SpecError, Unreachable
from orchestrator.importing import uncollected, unfreed
from orchestrator.sigterm import Sigterm

app = typer.Typer(
    name="orchestrator",
    help="Search, register and serve soft prompts for one frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Job = Annotated[Path, typer.Argument(help="Job spec, a YAML file.", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B.C=VALUE", help="Override a key; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also the logs of Ray and its workers.")]
Address = Annotated[
    str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster; this machine by default.", show_default=False)
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="Dashboard of the cluster's head; http://127.0.0.1:8265 by default.",
        show_default=False,
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="What `orchestrator submit` said, or jobs.", show_default=False)
]
Url = Annotated[str, typer.Option(envvar="ORCHESTRATOR_URL", help="Address of the running server.")]
DEFAULT_URL = "http://127.0.0.1:8000"
INTERRUPTED = 130  # typer turns Ctrl-C into an exit with this code
TERMINATED = 143  # the same by SIGTERM; both as shells count, 128 and the signal


def out(text: str = "") -> None:
    """A result, on standard output."""
    typer.echo(text)


def say(text: str) -> None:
    """Anything else, on standard error."""
    typer.echo(text, err=True)


@contextmanager
def results_only() -> Iterator[None]:
    """What libraries and child processes print meanwhile goes to standard error: standard output is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_json(document: Any) -> None:
    out(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def version(show: bool) -> None:
    if show:
        out(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Search, register and serve soft prompts for one frozen language model."""


@app.command()
def validate(job: Job, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Check a job spec: every problem at once, each with its line."""
    from orchestrator.job_file import load_job
    from orchestrator.space import trials
    from orchestrator.wording import counted

    spec = load_job(job, overrides)
    if as_json:
        return print_json({"valid": True, "spec": spec.model_dump(mode="json")})
    out(f"{job}: sound. {spec.method} of {spec.base_model.id}, {counted(len(trials(spec.search)), 'trial')}.")
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
    from orchestrator.display import plan_page

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
            from orchestrator.progress import ConsoleProgress
            from orchestrator.run import run_job

        document = run_job(spec, ConsoleProgress(spec, console, quiet), address, verbose, planned)
    if as_json:
        return print_json(document)
    from orchestrator.display import run_summary

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
            from orchestrator.progress import ConsoleProgress
            from orchestrator.resume import resume_search

        document, spec = resume_search(search, lambda job: ConsoleProgress(job, console, quiet), address, verbose)
    if as_json:
        return print_json(document)
    from orchestrator.display import run_summary

    for line in run_summary(document, spec):
        out(line)


@app.command()
def submit(
    job: Job,
    overrides: Overrides = [],  # noqa: B006
    address: Dashboard = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log, and exit with the outcome.")] = True,
    retries: Annotated[int, typer.Option(min=0, help="Submit again so often when the job or its cluster is lost.")] = 0,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The cluster's folder for searches, or s3://...; one that outlives its nodes."
        ),
    ] = None,
    shared: Annotated[
        list[Path], typer.Option(metavar="DIR", help="Folder that the nodes have too: not packed; repeatable.")
    ] = [],  # noqa: B006
    env: Annotated[
        list[str], typer.Option(metavar="NAME[=VALUE]", help="Environment variable of the job; repeatable.")
    ] = [],  # noqa: B006
    pip: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Install these packages for the job, where the image has not.")
    ] = None,
    image_has_code: Annotated[
        bool, typer.Option("--image-has-code", help="Run the orchestrator of the cluster's image, not this one.")
    ] = False,
    label: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="For attributing costs; repeatable.")] = [],  # noqa: B006
    cpus: Annotated[
        float,
        typer.Option("--entrypoint-num-cpus", min=0, help="Reserve so many for the driver, on any node; 0: the head."),
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request; ask nobody, send nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a job on a cluster, packed with its files; submitting the same again attaches to it."""
    from orchestrator.job_file import load_job

    spec = load_job(job, overrides)
    with results_only():
        from orchestrator.submission import make_submission, submit_job

        made = make_submission(
            spec, address, retries=retries, home=home, shared=shared, asked=env, pip=pip,
            image_has_code=image_has_code, labels=label, cpus=cpus,
        )  # fmt: skip
        document = made.document() if dry_run else submit_job(made, say, _nothing if quiet else say, wait)
    if as_json:
        return print_json(document)
    if dry_run:
        from orchestrator.display import request_page

        return _lines(request_page(document))
    if not wait:
        found = shlex.quote(document["id"])
        out(document["id"])
        return say(f"next: orchestrator logs {found} --follow   or   orchestrator stop {found}")
    _lines(document["result"].get("summary", []))


def _nothing(text: str) -> None:
    """Where progress goes that nobody wants."""


@app.command()
def jobs(address: Dashboard = None, as_json: Json = False) -> None:
    """Jobs that were submitted to a cluster, the newest last."""
    from orchestrator.submission import Cluster

    with results_only():
        found = Cluster(address).jobs()
    from orchestrator.display import jobs_document, jobs_table

    return print_json(jobs_document(found)) if as_json else _lines(jobs_table(found))


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To the job's end; exits with its outcome.")] = False,
    address: Dashboard = None,
    as_json: Json = False,
) -> None:
    """What a submitted job has said so far."""
    from orchestrator.submission import Cluster, followed_document, known_job, visible

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
    if as_json:
        print_json({**document, "log": seen})
    elif follow:
        _lines(document["result"].get("summary", []))


@app.command()
def stop(job_id: JobId, address: Dashboard = None, as_json: Json = False) -> None:
    """Stop a submitted job, and wait until it has closed its MLflow runs and ended."""
    from orchestrator.submission import Cluster, stop_job

    with results_only():
        stopped, found = stop_job(Cluster(address), job_id)
    if as_json:
        return print_json({"id": job_id, "stopped": stopped, "status": found.status})
    out(f"job {job_id} {'is stopped' if found.status == 'stopped' else f'has {found.status}'}.")
    if found.status != "succeeded":
        out("next: the same orchestrator submit goes on from what was kept")


@app.command("on-cluster", hidden=True)
def on_cluster() -> None:
    """What a submitted job runs on the cluster."""
    from rich.console import Console

    from orchestrator.submission import result_line

    console = Console(stderr=True)
    try:
        with results_only():
            from orchestrator.display import run_summary
            from orchestrator.on_cluster import carry_out
            from orchestrator.progress import ConsoleProgress

            document, spec = carry_out(lambda job: ConsoleProgress(job, console))
            document["summary"] = run_summary(document, spec)
    except OrchestratorError as error:
        out(result_line({"error": {"message": error.message, "next": error.hint, "exit_code": error.exit_code}}))
        raise
    out(result_line(document))


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
        from orchestrator.display import table
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
def models(
    model: Annotated[str | None, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """The registry: every model, the versions of one, or one version in full."""
    from orchestrator import display
    from orchestrator.registry import Registry, parse_ref

    registry = Registry()
    if model is None:
        listed = registry.list_models()
        return print_json(display.models_document(listed)) if as_json else _lines(display.models_table(listed))
    registry.check()
    ref = parse_ref(model)
    if ref.alias is None and ref.version is None:
        from orchestrator.registry_pages import history_document, history_lines

        versions, moves = registry.versions(ref.name), registry.history(ref.name)
        if as_json:
            return print_json(display.versions_document(ref.name, versions) | {"history": history_document(moves)})
        return _lines([*history_lines(moves), *display.versions_table(ref.name, versions)])
    detail = registry.version(ref)
    return print_json(display.version_document(detail)) if as_json else _lines(display.version_page(detail))


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    number: Annotated[int, typer.Argument(metavar="VERSION", help="Version to promote.", show_default=False)],
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "champion",
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Pass the gate; who, when and why are kept on record.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version that fits and, for champion, beats the one that is there."""
    from orchestrator.registry import Registry

    registry = Registry()
    registry.check()
    before, after = registry.promote(model, number, alias, force_reason=force)
    if as_json:
        return print_json({"name": model, "alias": alias, "from": before, "to": after})
    was = f"; it was on version {before}, `orchestrator rollback {model}` puts it back" if before else ""
    out(f"{model}@{alias} is version {after}{was}.")
    out(f"next: orchestrator serve {model}   (a running server follows by itself)")


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    alias: Annotated[str, typer.Option(help="Alias to put back.")] = "champion",
    reason: Annotated[str, typer.Option(help="Why; kept on record.")] = "",
    as_json: Json = False,
) -> None:
    """Put an alias back to the version it was on before."""
    from orchestrator.registry import Registry

    registry = Registry()
    registry.check()
    before, after = registry.rollback(model, alias, reason)
    if as_json:
        return print_json({"name": model, "alias": alias, "from": before, "to": after})
    out(f"{model}@{alias} is version {after} again, after version {before}.")
    out(f"next: orchestrator models {model}")


@app.command()
def compare(
    one: Annotated[str, typer.Argument(metavar="A", help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Two versions side by side: configuration, metrics, nearest words."""
    from orchestrator.registry import Registry
    from orchestrator.registry_pages import comparison_document, comparison_page

    registry = Registry()
    registry.check()
    document = comparison_document(registry.version(one), registry.version(other))
    return print_json(document) if as_json else _lines(comparison_page(document))


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)
    ],
    data: Annotated[list[str], typer.Option(help="File (.jsonl, .csv, .tsv, .parquet) or hub data set; repeatable.")],
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "test",
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="A line for each value of a column too.")] = None,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="Target, if named otherwise there.")] = None,
    references: Annotated[str | None, typer.Option(metavar="COLUMN", help="Right texts of generated ones.")] = None,
    rename: Annotated[list[str], typer.Option(metavar="OLD=NEW", help="Rename a column; repeatable.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows only.")] = None,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="The versions also vote, in one batch.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")] = None,
    keep: Annotated[bool, typer.Option("--log/--no-log", help="Keep the result with each version.")] = True,
    as_json: Json = False,
) -> None:
    """Registered prompts on any data: domain shift, several versions at once, votes."""
    pairs = _renames(rename)
    with results_only():
        from orchestrator.evaluation import Question, evaluate_models
        from orchestrator.registry import Registry

        registry = Registry()
        registry.check()
        questions = [Question(one, split, by, target, references, pairs, limit) for one in data]
        document = evaluate_models(registry, models, questions, ensemble, base_model, keep, say)
    if as_json:
        return print_json(document)
    from orchestrator.registry_pages import shift_page

    _lines(shift_page(document))


def _renames(pairs: list[str]) -> dict[str, str]:
    named = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (old, _, new) in zip(pairs, named, strict=True) if not (old and new)]:
        raise BadInput(f"--rename {wrong[0]!r} is not OLD=NEW", "for instance --rename sentence=text")
    return {old: new for old, _, new in named}


@app.command("export")
def export_(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; must not exist.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write a registered prompt as a PEFT adapter folder."""
    with results_only():
        from orchestrator.exchange import export_model
        from orchestrator.registry import Registry

        registry = Registry()
        registry.check()
        document = export_model(registry, model, folder)
    if as_json:
        return print_json(document)
    out(f"{document['name']}:{document['version']} is in {folder}, as {document['peft_type']} of PEFT.")
    out(f"next: PeftModel.from_pretrained(base, {str(folder)!r}) in Python")
    out(f"  or: orchestrator import {shlex.quote(str(folder))} --name NAME --job JOB   (into another registry)")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="PEFT adapter folder.", show_default=False)],
    name: Annotated[str, typer.Option(help="Registered model to make a version of.", show_default=False)],
    job: Annotated[
        Path,
        typer.Option(help="Job spec with the base model, template, target, verbalizer and data.", show_default=False),
    ],
    overrides: Overrides = [],  # noqa: B006
    renamed: Annotated[
        bool, typer.Option("--renamed-base-model", help="The job's base model is the folder's under another name.")
    ] = False,
    alias: Annotated[
        str | None,
        typer.Option(
            help="Alias to move to the version; the job's by default. An import is champion only if asked for here.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Register a PEFT adapter folder (prompt tuning, prefix tuning or P-tuning)."""
    from orchestrator.job_file import load_job

    spec = load_job(job, overrides)
    with results_only():
        from orchestrator.exchange import import_folder
        from orchestrator.registry import Registry

        registry = Registry()
        registry.check()
        document = import_folder(registry, folder, name, spec, renamed, say, alias)
    if as_json:
        return print_json(document)
    made = f"{document['model']['name']}:{document['model']['version']}"
    out(f"{made} holds {document['num_virtual_tokens']} virtual tokens of {document['base_model']}.")
    if document["model"]["alias"] == "champion":
        return out(f"next: orchestrator inspect {made}   or   orchestrator serve {made}")
    number = document["model"]["version"]
    out(f"next: orchestrator evaluate {made} --data FILE   then   orchestrator promote {name} {number}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)],
    nearest: Annotated[int, typer.Option(min=1, help="Vocabulary tokens to show for each virtual one.")] = 5,
    base_model: Annotated[str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")] = None,
    as_json: Json = False,
) -> None:
    """Read a prompt: the words that its virtual tokens are near, and how far they went from their start."""
    with results_only():
        from orchestrator.inspection import inspect_model
        from orchestrator.registry import Registry

        registry = Registry()
        registry.check()
        document = inspect_model(registry, model, nearest, base_model)
    if as_json:
        return print_json(document)
    from orchestrator.display import inspection_page

    _lines(inspection_page(document))


@app.command()
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models to serve; all by default.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback only without API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    base_model: Annotated[str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")] = None,
    replicas: Annotated[int, typer.Option(min=0, help="Replicas, or with --max-replicas the least of them.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Follow the load up to so many replicas.", show_default=False)
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores of a replica; half of this machine's.", show_default=False)
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, max=1, help="GPUs of a replica; one if there are any.", show_default=False)
    ] = None,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="Ask another replica when one dies before it answers; a hop more.")
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line of JSON for each request.")] = False,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file: HTTPS.", show_default=False)] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key.", show_default=False)] = None,
) -> None:
    """Serve registered prompts until interrupted, by default every model at its champion."""
    from orchestrator.registry import Registry
    from orchestrator.serving.app import start
    from orchestrator.serving.options import ServeOptions

    Registry().check()
    options = ServeOptions(
        tuple(models or ()), base_model=base_model, host=host, port=port, replicas=replicas, max_replicas=max_replicas,
        cpus=cpus, gpus=gpus, retry_dead=retry_dead, access_log=access_log, tls_cert=tls_cert, tls_key=tls_key,
    )  # fmt: skip
    say("starting Ray Serve ...")
    server = start(options)
    try:
        say(f"serving {', '.join(options.models) or 'every registered prompt'} on {server.base_model} at {server.url}")
        say('next: in another terminal, orchestrator query MODEL "some text"   (Ctrl-C ends the server)')
        server.wait()
    finally:
        server.close()


@app.command()
def canary(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    alias: Annotated[str | None, typer.Argument(help="Alias that takes a share.", show_default=False)] = None,
    percent: Annotated[float, typer.Option(help="Share of the name's requests.")] = 10.0,
    end: Annotated[bool, typer.Option("--end", help="All requests go to the champion again.")] = False,
    as_json: Json = False,
) -> None:
    """Send a share of a name's requests to another alias. Running servers follow by themselves."""
    from orchestrator.registry import Registry

    if (alias is None) != end:
        raise BadInput("name an alias, or --end the canary", f"orchestrator canary {model} challenger --percent 10")
    registry = Registry()
    registry.check()
    found = registry.end_canary(model) if alias is None else registry.set_canary(model, alias, percent)
    if as_json:
        shown = {"alias": found.alias, "percent": found.percent} if found else None
        return print_json({"name": model, "canary": None if end else shown, "ended": shown if end else None})
    if end:
        out(f"{model} is its champion alone." if found else f"{model} had no canary.")
        return out(f"next: orchestrator models {model}")
    out(f"{percent:g} % of the requests for {model} go to {model}@{alias}.")
    out(f"next: orchestrator canary {model} --end   or   orchestrator promote {model} VERSION")


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="What logs call the key.", show_default=False)],
    file: Annotated[Path, typer.Option(help="Key file, for ORCHESTRATOR_API_KEYS_FILE.")] = Path("keys.json"),
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Registered model that it may ask; repeatable.")
    ] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute of each replica.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key. It is shown once; the file keeps its digest."""
    from orchestrator.serving.access import add_key

    secret = add_key(file, name, models or (), per_minute)
    if as_json:
        return print_json({"name": name, "key": secret, "file": str(file)})
    out(secret)
    say(f"next: ORCHESTRATOR_API_KEYS_FILE={file} orchestrator serve   (start servers anew to let the key in)")


@app.command()
def query(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)],
    text: Annotated[
        str, typer.Argument(help="Input text, or a JSON object with one value a column.", show_default=False)
    ],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Ask a running server: the label and its probability, or the generated text."""
    from orchestrator.query import ask

    answer = ask(url, model, text, os.environ.get("ORCHESTRATOR_API_KEY"))
    if as_json:
        return print_json(answer.document)
    out(answer.text)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535)] = 5000) -> None:
    """Open the registry in MLflow's own UI, until interrupted."""
    from orchestrator.registry import Registry

    registry = Registry()
    registry.check()
    command = registry.ui_command(port)
    say(f"MLflow on {registry.display_uri}: http://127.0.0.1:{port}   (Ctrl-C ends it)")
    os.execvpe(command.argv[0], command.argv, {**os.environ, **command.env})


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what is missing, and the fix."""
    from orchestrator.doctor import examine

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


def _lines(lines: list[str]) -> None:
    for line in lines:
        out(line)


def _repeated(overrides: list[str]) -> str:
    return "".join(f" --set {shlex.quote(override)}" for override in overrides)


def main() -> NoReturn:
    """Entry point: runs a verb and turns errors into messages and exit codes."""
    code = _guarded(lambda: app(prog_name="orchestrator", standalone_mode=False))
    if code == TERMINATED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is said: a second one has nothing to end
    unfreed()
    sys.exit(code)


def _guarded(verb: Callable[[], Any]) -> int:
    with Sigterm() as sigterm:
        try:
            result = verb()
            code = result if isinstance(result, int) else 0
            return _interrupted(sigterm) if code == INTERRUPTED else code
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted(sigterm)
        except Interrupted as error:
            return _interrupted(sigterm, error.hint, error.message)
        except OrchestratorError as error:
            sigterm.over()
            return _failed(error)
        except Exception as error:
            sigterm.over()
            # Typer has click's classes inside, in some versions as a copy: what they can do tells its usage errors.
            if callable(show := getattr(error, "show", None)):
                show()
                return _document("failed", str(error), "orchestrator --help", BadInput.exit_code)
            return _unforeseen(error)


def _failed(error: OrchestratorError) -> int:
    problems = [vars(problem) for problem in error.problems] if isinstance(error, SpecError) else []
    kind = {BadInput.exit_code: "bad input", Unreachable.exit_code: "unreachable"}.get(error.exit_code, "failed")
    say(f"{kind}: {error}" if not isinstance(error, SpecError) else str(error))
    return _document("failed", error.message, error.hint, error.exit_code, problems)


def _unforeseen(error: Exception) -> int:
    """An error that we did not expect: said in one line; the traceback is for whoever asks for it."""
    import traceback

    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return _failed(
        OrchestratorError(f"an unforeseen error, please report it: {text}", f"{TRACEBACK}=1 shows where it arose")
    )


def _interrupted(sigterm: Sigterm, resume: str = "", message: str = "interrupted") -> int:
    """``resume`` is the command that goes on; without one nothing was kept, and the same command starts over."""
    again = resume or shlex.join(["orchestrator", *sys.argv[1:]])
    say(f"{message}\n  next: {again}   {'goes on' if resume else 'starts over'}")
    return _document("interrupted", message, again, TERMINATED if sigterm.received else INTERRUPTED)


def _document(status: str, message: str, hint: str, code: int, problems: Any = ()) -> int:
    """With --json, programs get the failure as a document too. Returns the exit code."""
    if "--json" in sys.argv[1:]:
        error = {"message": message, "next": hint, "problems": list(problems), "exit_code": code}
        print_json({"status": status, "error": error})
    return code
