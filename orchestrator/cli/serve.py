"""Verbs that serve registered prompts and ask a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import open_registry
from orchestrator.cli.groups import SERVE, verb
from orchestrator.cli.options import DEFAULT_URL, Json, Url
from orchestrator.cli.output import present, say
from orchestrator.errors import BadInput


@verb(SERVE)
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models to serve; all by default.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback only without API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    base_model: Annotated[
        str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="Replicas, or with --max-replicas the least of them.")
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Follow the load up to so many replicas.", show_default=False),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="Cores of a replica; half of this machine's.", show_default=False),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="GPUs of a replica; one if there are any.", show_default=False
        ),
    ] = None,
    retry_dead: Annotated[
        bool,
        typer.Option(
            "--retry-dead", help="Ask another replica when one dies before it answers; a hop more."
        ),
    ] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line of JSON for each request.")
    ] = False,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate file: HTTPS.", show_default=False)
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key.", show_default=False)] = None,
) -> None:
    """Serve registered prompts until interrupted.

    By default every model is served, at its champion version.
    """
    from orchestrator.serving.app import start
    from orchestrator.serving.deploy.options import ServeOptions

    open_registry()
    options = ServeOptions(
        tuple(models or ()),
        base_model=base_model,
        host=host,
        port=port,
        replicas=replicas,
        max_replicas=max_replicas,
        cpus=cpus,
        gpus=gpus,
        retry_dead=retry_dead,
        access_log=access_log,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    say("starting Ray Serve ...")
    server = start(options)
    try:
        say(
            f"serving {', '.join(options.models) or 'every registered prompt'} "
            f"on {server.base_model} at {server.url}"
        )
        say(
            'next: in another terminal, orchestrator query MODEL "some text"   '
            "(Ctrl-C ends the server)"
        )
        server.wait()
    finally:
        server.close()


@verb(SERVE)
def query(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)
    ],
    text: Annotated[
        str,
        typer.Argument(
            help="Input text, or a JSON object with one value a column.", show_default=False
        ),
    ],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Send one input to a running server, and print its answer.

    The answer is the label with its probability, or the generated text.
    """
    from orchestrator.serving.client import ask

    answer = ask(url, model, text, os.environ.get("ORCHESTRATOR_API_KEY"))
    present(answer.document, as_json, lambda: [answer.text])


@verb(SERVE)
def canary(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    alias: Annotated[
        str | None, typer.Argument(help="Alias that takes a share.", show_default=False)
    ] = None,
    percent: Annotated[float, typer.Option(help="Share of the name's requests.")] = 10.0,
    end: Annotated[
        bool, typer.Option("--end", help="All requests go to the champion again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a share of a model's requests to another alias.

    The share concerns requests that name the model alone. Running servers follow without a restart.
    """
    if (alias is None) != end:
        raise BadInput(
            "name an alias, or --end the canary",
            f"orchestrator canary {model} challenger --percent 10",
        )
    registry = open_registry()
    found = (
        registry.end_canary(model) if alias is None else registry.set_canary(model, alias, percent)
    )
    shown = {"alias": found.alias, "percent": found.percent} if found else None
    document = {"name": model, "canary": None if end else shown, "ended": shown if end else None}
    if end:
        lines = [
            f"{model} is its champion alone." if found else f"{model} had no canary.",
            f"next: orchestrator models {model}",
        ]
    else:
        lines = [
            f"{percent:g} % of the requests for {model} go to {model}@{alias}.",
            f"next: orchestrator canary {model} --end   or   orchestrator promote {model} VERSION",
        ]
    present(document, as_json, lambda: lines)


@verb(SERVE)
def key(
    name: Annotated[str, typer.Argument(help="What logs call the key.", show_default=False)],
    file: Annotated[Path, typer.Option(help="Key file, for ORCHESTRATOR_API_KEYS_FILE.")] = Path(
        "keys.json"
    ),
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Registered model that it may ask; repeatable."),
    ] = None,
    per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute of each replica.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an API key for servers.

    The key is shown once; the file keeps only its digest.
    """
    from orchestrator.serving.http.access import add_key

    secret = add_key(file, name, models or (), per_minute)
    next_step = (
        f"next: ORCHESTRATOR_API_KEYS_FILE={file} orchestrator serve   "
        "(start servers anew to let the key in)"
    )
    document = {"name": name, "key": secret, "file": str(file)}
    present(document, as_json, lambda: [secret], aside=next_step)
