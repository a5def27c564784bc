"""Verbs about registered prompts: list, compare, evaluate, move aliases, export, import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from orchestrator.cli.common import open_registry, read_job
from orchestrator.cli.groups import REGISTRY, verb
from orchestrator.cli.options import Json, Overrides
from orchestrator.cli.output import present, results_only, say
from orchestrator.errors import BadInput

ExportFormat: TypeAlias = Literal["peft", "tokens", "embeds"]


@verb(REGISTRY)
def models(
    model: Annotated[
        str | None, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the registered models, or one model's versions.

    A version, given as NAME@ALIAS or NAME:VERSION, is shown in full.
    """
    from orchestrator.cli.pages import registry as pages
    from orchestrator.registry import Registry, parse_ref

    if model is None:
        listed = Registry().list_models()
        return present(pages.models_document(listed), as_json, lambda: pages.models_table(listed))
    registry = open_registry()
    ref = parse_ref(model)
    if ref.alias is None and ref.version is None:
        from orchestrator.cli.pages.comparison import history_document, history_lines

        versions, moves = registry.versions(ref.name), registry.history(ref.name)
        document = pages.versions_document(ref.name, versions) | {
            "history": history_document(moves)
        }
        return present(
            document,
            as_json,
            lambda: [*history_lines(moves), *pages.versions_table(ref.name, versions)],
        )
    detail = registry.version(ref)
    present(pages.version_document(detail), as_json, lambda: pages.version_page(detail))


@verb(REGISTRY)
def compare(
    one: Annotated[
        str,
        typer.Argument(metavar="A", help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False),
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two versions: configuration, metrics, nearest words."""
    from orchestrator.cli.pages.comparison import comparison_document, comparison_page

    registry = open_registry()
    document = comparison_document(registry.version(one), registry.version(other))
    present(document, as_json, lambda: comparison_page(document))


@verb(REGISTRY)
def inspect(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False)
    ],
    nearest: Annotated[
        int, typer.Option(min=1, help="Vocabulary tokens to show for each virtual one.")
    ] = 5,
    base_model: Annotated[
        str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which words a prompt's virtual tokens are near.

    Also shows how far the tokens have moved from their start. A prefix has no embeddings: the mean
    norms of its keys and values are shown instead, layer by layer.
    """
    with results_only():
        from orchestrator.cli.workbench.inspect import inspect_model

        registry = open_registry()
        document = inspect_model(registry, model, nearest, base_model)
    from orchestrator.cli.pages.registry import inspection_page

    present(document, as_json, lambda: inspection_page(document))


@verb(REGISTRY)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(help="File (.jsonl, .csv, .parquet, ...) or hub data set; repeatable."),
    ],
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "test",
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A line for each value of a column too.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Target, if named otherwise there.")
    ] = None,
    references: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Right texts of generated ones.")
    ] = None,
    rename: Annotated[
        list[str], typer.Option(metavar="OLD=NEW", help="Rename a column; repeatable.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows only.")] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="The versions also vote, in one batch.")
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Metric to compare by, also a function's module:function."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--log/--no-log", help="Keep the result with each version.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Evaluate registered prompts on any data.

    Shows how far each version's metric drops from its own test split to the new data (domain
    shift). Several versions are evaluated at once, and can vote with --ensemble.
    """
    pairs = _renames(rename)
    with results_only():
        from orchestrator.cli.workbench.domain_shift import Question, evaluate_models

        registry = open_registry()
        questions = [Question(one, split, by, target, references, pairs, limit) for one in data]
        document = evaluate_models(
            registry, models, questions, ensemble, base_model, keep, say, metric
        )
    from orchestrator.cli.pages.comparison import shift_page

    present(document, as_json, lambda: shift_page(document))


def _renames(pairs: list[str]) -> dict[str, str]:
    named = [pair.partition("=") for pair in pairs]
    if wrong := [
        pair for pair, (old, _, new) in zip(pairs, named, strict=True) if not (old and new)
    ]:
        raise BadInput(
            f"--rename {wrong[0]!r} is not OLD=NEW", "for instance --rename sentence=text"
        )
    return {old: new for old, _, new in named}


@verb(REGISTRY)
def promote(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    number: Annotated[
        int, typer.Argument(metavar="VERSION", help="Version to promote.", show_default=False)
    ],
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "champion",
    force: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Pass the gate; who, when and why are kept on record."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version, if the version passes the gate.

    The version must fit the server and clients of the version that holds the alias. To become
    champion it must also beat the current champion on the same test rows.
    """
    registry = open_registry()
    moved = registry.promotion(model, number, alias, force_reason=force)
    before, after = moved.before, moved.after
    was = (
        f"; it was on version {before}, `orchestrator rollback {model}` puts it back"
        if before
        else ""
    )
    lines = [
        f"{model}@{alias} is version {after}{was}.",
        *([f"Why: {moved.reason}."] if moved.reason else []),
        f"next: orchestrator serve {model}   (a running server follows by itself)",
    ]
    document = _move(model, alias, before, after) | moved.document()
    present(document, as_json, lambda: lines)


def _move(model: str, alias: str, before: int | None, after: int) -> dict[str, Any]:
    """Return the document of a verb that moved an alias."""
    return {"name": model, "alias": alias, "from": before, "to": after}


@verb(REGISTRY)
def rollback(
    model: Annotated[str, typer.Argument(help="Registered model.", show_default=False)],
    alias: Annotated[str, typer.Option(help="Alias to put back.")] = "champion",
    reason: Annotated[str, typer.Option(help="Why; kept on record.")] = "",
    as_json: Json = False,
) -> None:
    """Move an alias back to the version that held it before."""
    registry = open_registry()
    before, after = registry.rollback(model, alias, reason)
    lines = [
        f"{model}@{alias} is version {after} again, after version {before}.",
        f"next: orchestrator models {model}",
    ]
    present(_move(model, alias, before, after), as_json, lambda: lines)


@verb(REGISTRY, "export")
def export_(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="NAME, NAME@ALIAS or NAME:VERSION.", show_default=False
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder to write; must not exist.", show_default=False),
    ],
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="peft (an adapter), tokens (a model with virtual tokens) or embeds (for vLLM).",
        ),
    ] = "peft",
    base_model: Annotated[
        str | None, typer.Option(help="Base model, if it lies elsewhere than when tuning.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Add a model card (README.md), as the hub shows it.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload the folder, with its card, as a new repository of the hub.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a registered prompt as a PEFT adapter folder.

    With --format tokens, one or more prompts on one base model become a model folder that other
    engines serve like any model. With --format embeds, a prompt's vectors are written with a client
    for vLLM's own server.

    --push takes the hub's address and token from HF_ENDPOINT and HF_TOKEN. A failed upload leaves
    the folder whole.
    """
    if private and push is None:
        raise BadInput("--private is about the repository of --push", "add --push OWNER/NAME")
    if form != "peft" and (card or push is not None):
        raise BadInput(
            f"--card and --push are for a PEFT folder, and --format is {form}",
            "leave --format out, or leave --card and --push out",
        )
    with results_only():
        from orchestrator.cli.workbench.exchange import export_models

        registry = open_registry()
        document = export_models(
            registry, models, folder, form, base_model, card=card, push=push, private=private
        )
    from orchestrator.cli.pages.registry import export_page

    present(document, as_json, lambda: export_page(document, folder))


@verb(REGISTRY, "import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="PEFT adapter folder.", show_default=False)
    ],
    name: Annotated[
        str, typer.Option(help="Registered model to make a version of.", show_default=False)
    ],
    job: Annotated[
        Path,
        typer.Option(
            help="Job spec with the base model, template, target, verbalizer and data.",
            show_default=False,
        ),
    ],
    overrides: Overrides = [],  # noqa: B006
    renamed: Annotated[
        bool,
        typer.Option(
            "--renamed-base-model", help="The job's base model is the folder's under another name."
        ),
    ] = False,
    alias: Annotated[
        str | None,
        typer.Option(
            help=(
                "Alias to move to the version; the job's by default. "
                "An import is champion only if asked for here."
            ),
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Register a PEFT adapter folder.

    The adapter may be one of prompt tuning, prefix tuning or P-tuning.
    """
    spec = read_job(job, overrides)
    with results_only():
        from orchestrator.cli.workbench.exchange import import_folder

        registry = open_registry()
        document = import_folder(registry, folder, name, spec, renamed, say, alias)
    from orchestrator.cli.pages.registry import import_page

    present(document, as_json, lambda: import_page(document))


@verb(REGISTRY)
def ui(port: Annotated[int, typer.Option(min=1, max=65535)] = 5000) -> None:
    """Run MLflow's own UI on the registry, until interrupted."""
    registry = open_registry()
    command = registry.ui_command(port)
    say(f"MLflow on {registry.display_uri}: http://127.0.0.1:{port}   (Ctrl-C ends it)")
    os.execvpe(command.argv[0], command.argv, {**os.environ, **command.env})
