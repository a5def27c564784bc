"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[Path, typer.Argument(help="Job spec, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B.C=VALUE", help="Override a key; repeatable.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on standard output, nothing else there."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also the logs of Ray and its workers.")
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS", help="Ray cluster; this machine by default.", show_default=False
    ),
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
    str,
    typer.Argument(
        metavar="ID", help="What `orchestrator submit` said, or jobs.", show_default=False
    ),
]
Url = Annotated[str, typer.Option(envvar="ORCHESTRATOR_URL", help="Address of the running server.")]
DEFAULT_URL = "http://127.0.0.1:8000"
