"""Exporting registered prompts, and importing PEFT adapter folders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator import __version__
from orchestrator.artifact import SOFT, BaseModelRecord, PromptArtifact
from orchestrator.artifact.peft import README, ImportedTask, export_peft, import_peft, read_peft
from orchestrator.cli.workbench.card import card_facts, model_card
from orchestrator.cli.workbench.hub import base_licence, check_repository, push_folder
from orchestrator.cli.workbench.other_engines import export_embeds, export_tokens
from orchestrator.data.dataset import RowSplits, load_rows
from orchestrator.data.encoding import Encoder, make_encoder
from orchestrator.data.source_row import Row
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.models.adapter_folder import ADAPTER_CONFIG
from orchestrator.models.backbone import Backbone, default_device, load_backbone
from orchestrator.models.nearest_words import nearest_words
from orchestrator.models.source import resolve_model
from orchestrator.registry import CHAMPION, Registry, VersionSummary, check_alias, check_name
from orchestrator.search.prepare import (
    cells_record,
    chat_record,
    data_record,
    found_anywhere,
    verbalizer_entries,
)
from orchestrator.serving.prompts.served_prompt import load_prompt
from orchestrator.utils.documents import JsonObject

Say = Callable[[str], None]


def export_models(
    registry: Registry,
    models: Sequence[str],
    folder: Path,
    form: str,
    base_model: str | None = None,
    card: bool = False,
    push: str | None = None,
    private: bool = False,
) -> JsonObject:
    """Write registered prompts in a format; return the document of ``export --json``.

    ``card``, ``push`` and ``private`` are those of ``export_model``, for the format peft alone.
    Raises BadInput for prompts that the format can't express, and for a folder that exists.
    """
    if form == "tokens":
        return export_tokens(registry, models, folder, base_model)
    if len(models) > 1:
        raise BadInput(
            f"--format {form} writes one prompt, and {len(models)} are named: {', '.join(models)}",
            "export each into a folder of its own, or all into one with --format tokens",
        )
    if form == "embeds":
        return export_embeds(registry, models[0], folder, base_model)
    if base_model is not None:
        raise BadInput(
            "--base-model has no effect with --format peft, which needs no base model",
            "leave --base-model out",
        )
    return export_model(registry, models[0], folder, card, push, private)


def export_model(
    registry: Registry,
    model: str,
    folder: Path,
    card: bool = False,
    push: str | None = None,
    private: bool = False,
) -> JsonObject:
    """Write a registered prompt as a PEFT folder; return the document of ``export --json``.

    ``card`` adds a model card as README.md. ``push`` names a new repository on the hub, where the
    folder is uploaded with its card. Raises BadInput for a prompt that PEFT can't express, for a
    folder that exists and for a repository that the hub refuses; Unreachable if the hub does not
    answer. What is found wrong with the repository after the folder is written leaves it whole.
    """
    version = registry.resolve(model)
    artifact = PromptArtifact.load(registry.fetch(version.name, version.version))
    if push is not None:
        check_repository(push)
    if not card and push is None:
        export_peft(artifact, folder)
        return _exported(version, folder)
    base = artifact.manifest.base_model
    licence = base_licence(base.id, base.revision)
    adapter = push or folder.resolve().name
    facts = card_facts(registry, version, artifact.manifest, adapter, licence)
    made = model_card(facts)
    export_peft(artifact, folder, str(made))
    document = _exported(version, folder) | {"card": str(folder.resolve() / README)}
    if facts.base.kind != "hub":
        document["warning"] = (
            f"the base model {facts.base.name!r} is not on the hub: the card's metadata name no "
            f"base model, and {ADAPTER_CONFIG} names {base.id!r}"
        )
    if push is not None:
        address = push_folder(folder, push, made, private)
        document["repository"] = {"id": push, "url": address, "private": private}
    return document


def _exported(version: VersionSummary, folder: Path) -> JsonObject:
    """Describe an exported folder, as far as PEFT reads it."""
    written = read_peft(folder).config
    return {
        "name": version.name,
        "version": version.version,
        "folder": str(folder.resolve()),
        "peft_type": written.peft_type,
        "task_type": written.task_type,
        "num_virtual_tokens": written.num_virtual_tokens,
        "base_model": written.base_model_name_or_path,
    }


def import_folder(
    registry: Registry,
    folder: Path,
    name: str,
    job: JobSpec,
    renamed: bool,
    say: Say,
    alias: str | None = None,
) -> JsonObject:
    """Register a PEFT folder as a version of ``name``; return the document of ``import --json``.

    The job provides the base model, template, target, verbalizer and rows. The prompt is tried on
    the base model before it is registered. Its metrics are unknown until it is evaluated.
    ``renamed`` is passed to ``import_peft``.

    ``alias`` is moved to the version. Without it, the version gets the job's alias, unless that is
    the champion's.
    """
    check_name(name)
    if alias is None and job.registry.alias != CHAMPION:
        alias = job.registry.alias
    _check_alias_free(registry, name, alias)
    read_peft(folder)  # refuses a broken folder before a model is loaded
    registry.check_search_end(name, name)
    rows = load_rows(job.data)
    say("loading the base model")
    job, encoder, backbone = _loaded(job, rows)
    artifact = import_peft(
        folder, _task(job, rows, encoder, backbone), __version__, renamed=renamed
    )
    with tempfile.TemporaryDirectory() as scratch:
        saved = artifact.save(Path(scratch) / "prompt")
        load_prompt(backbone, saved, name, 0)
        version = _register(registry, artifact, saved, folder, name, job, rows.test[0])
    _move_alias(registry, name, version, alias, say)
    manifest = artifact.manifest
    return {
        "model": {"name": name, "version": version, "alias": alias},
        "folder": str(folder.resolve()),
        "method": manifest.method,
        "num_virtual_tokens": manifest.num_virtual_tokens,
        "base_model": manifest.base_model.id,
    }


def _task(job: JobSpec, rows: RowSplits, encoder: Encoder, backbone: Backbone) -> ImportedTask:
    """Describe the job's task as a manifest records it."""
    return ImportedTask(
        base_model=BaseModelRecord(**asdict(backbone.info)),
        template=job.data.template,
        target=job.data.target,
        verbalizer=verbalizer_entries(encoder),
        max_input_tokens=job.data.max_input_tokens,
        max_target_tokens=job.data.max_target_tokens,
        data=data_record(job.data, rows),
        cells=cells_record(job.data),
        sentinel=job.data.sentinel,
        chat=chat_record(encoder),
        special_tokens_in_text=job.data.special_tokens_in_text,
    )


def _check_alias_free(registry: Registry, name: str, alias: str | None) -> None:
    """Raise BadInput for an invalid alias, or for the champion's where there is a champion.

    Without metrics, an imported prompt can't be compared with the champion.
    """
    if alias is None:
        return
    check_alias(alias)
    if alias != CHAMPION:
        return
    models = {model.name: model.aliases for model in registry.list_models()}
    if (holder := models.get(name, {}).get(CHAMPION)) is not None:
        raise BadInput(
            f"version {holder} is champion of {name}, and an imported prompt has no metrics "
            "to compare with it",
            f"import without --alias {CHAMPION}, evaluate the version, "
            f"then orchestrator promote {name} VERSION",
        )


def _loaded(job: JobSpec, rows: RowSplits) -> tuple[JobSpec, Encoder, Backbone]:
    """Load the base model; return the job, its encoder and the model.

    The job then names its base model so that other processes can find it too.
    """
    job = found_anywhere(job, resolve_model(job.base_model))
    source = resolve_model(job.base_model)
    encoder = make_encoder(job.data, rows, source.tokenizer(), source.family, source.table_size)
    return job, encoder, load_backbone(source, default_device(), job.base_model.dtype)


def _move_alias(registry: Registry, name: str, version: int, alias: str | None, say: Say) -> None:
    """Move the alias to the version; say that any other version than the champion is unproven."""
    if alias == CHAMPION:
        registry.promote(name, version)
        return
    if alias is not None:
        registry.set_alias(name, alias, version, reason="imported")
    say(f"Version {version} is not champion: nothing is known yet of how good it is.")


def _register(
    registry: Registry,
    artifact: PromptArtifact,
    saved: Path,
    folder: Path,
    name: str,
    job: JobSpec,
    example: Row,
) -> int:
    """Register the artifact and return its version.

    The version comes from a run of its own, in the experiment of the registered model's name.
    """
    manifest = artifact.manifest
    params = {
        "imported_from": str(folder.resolve()),
        "method": manifest.method,
        "base_model": manifest.base_model.id,
        "num_virtual_tokens": manifest.num_virtual_tokens,
        "template": manifest.template,
    }
    words = []
    if SOFT in artifact.tensors:
        words = nearest_words(resolve_model(job.base_model), artifact.weights, 3)
    with registry.start_search(name, params, {"orchestrator.version": __version__}) as log:
        return registry.register(
            saved,
            name,
            log.run_id,
            metric=job.search.metric,
            better=job.search.better,
            example=example,
            nearest=words,
        )
