"""Registered models, their versions, and the inspection of one prompt."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.artifact import IMPORTED, Manifest
from orchestrator.cli.pages.table import aligned, metric_text, table
from orchestrator.job.labels import label_text
from orchestrator.job.space import TrialSpec
from orchestrator.registry import CHAMPION, ModelSummary, VersionDetail, VersionSummary, printable
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.wording import BASELINE_NAMES

START_HERE = "nothing is registered yet\nnext: orchestrator demo   or   orchestrator init"


# Reading a prompt


def inspection_page(document: Mapping[str, Any]) -> list[str]:
    """Format each virtual token with its nearest words, or each layer of a prefix with its norms.

    Both are shown with their drift from the start.
    """
    name = printable(f"{document['name']}:{document['version']}")
    soft = bool(document["tokens"])
    rows = [_token_row(token) for token in document["tokens"]] + [
        _layer_row(layer) for layer in document["layers"]
    ]
    legend = (
        f"nearest: vocabulary tokens by cosine distance; a token of the vocabulary has norm "
        f"{document['vocabulary_norm']:.3g} on average"
        if soft
        else "a prefix has keys and values and no embeddings: "
        "mean norms of a head's, next to those of real tokens"
    )
    drift = (
        f"no drift from the start: {printable(document['no_drift'])}"
        if document["no_drift"]
        else DRIFT
    )
    return [
        f"{name}: {document['method']}, {document['num_virtual_tokens']} virtual tokens of "
        + printable(document["base_model"]),
        *table(TOKEN_COLUMNS if soft else LAYER_COLUMNS, rows),
        legend,
        drift,
        f"next: orchestrator models {name}   or   orchestrator serve {name}",
    ]


DRIFT = "drift: cosine with the start, and the norm of the difference over the start's"
TOKEN_COLUMNS = ("token", "norm", "cosine", "moved", "nearest")
LAYER_COLUMNS = ("attention", "layer", "key", "real key", "value", "real value", "cosine", "moved")


def _token_row(token: Mapping[str, Any]) -> tuple[Any, ...]:
    near = "  ".join(
        f"{json.dumps(one['token'], ensure_ascii=False)} {one['distance']:.3f}"
        for one in token["nearest"]
    )
    return token["place"], f"{token['norm']:.3g}", *_drift_cells(token["drift"]), near


def _layer_row(layer: Mapping[str, Any]) -> tuple[Any, ...]:
    norms = (layer[key] for key in ("key_norm", "real_key_norm", "value_norm", "real_value_norm"))
    return (
        layer["site"],
        layer["layer"],
        *(f"{norm:.3g}" for norm in norms),
        *_drift_cells(layer["drift"]),
    )


def _drift_cells(drift: Mapping[str, Any] | None) -> tuple[str, str]:
    if drift is None:
        return "", ""
    cosine = "none" if drift["cosine"] is None else f"{drift['cosine']:.3f}"
    moved = f"{drift['norm'] / drift['start_norm']:.2f}" if drift["start_norm"] else "from 0"
    return cosine, moved


# Registry


def models_document(models: Sequence[ModelSummary]) -> list[JsonObject]:
    """Return the document of ``models --json``."""
    return [asdict(model) for model in models]


def models_table(models: Sequence[ModelSummary]) -> list[str]:
    """Format all models as a table; without any, say how to make one."""
    if not models:
        return START_HERE.splitlines()
    rows = [
        (
            printable(model.name),
            model.latest or "",
            _aliases(model.aliases),
            metric_text(model.champion_metrics) or ("" if model.is_prompt else "not a soft prompt"),
        )
        for model in models
    ]
    return [
        *table(("model", "newest", "aliases", "champion on test"), rows),
        "next: orchestrator models NAME",
    ]


def _aliases(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))


def versions_document(name: str, versions: Sequence[VersionSummary]) -> JsonObject:
    """Return a model's versions, for ``models NAME --json``."""
    return {"name": name, "versions": [_version_fields(version) for version in versions]}


def _version_fields(version: VersionSummary) -> JsonObject:
    fields = asdict(version)
    fields.pop("tags")
    return fields


def versions_table(name: str, versions: Sequence[VersionSummary]) -> list[str]:
    """Format a model's versions as a table."""
    rows = [
        (
            version.version,
            ", ".join(version.aliases),
            _config_label(version.config),
            metric_text(version.metrics),
            f"{version.created_at:%Y-%m-%d %H:%M}",
        )
        for version in versions
    ]
    shown = printable(name)
    return [
        *table(("version", "aliases", "configuration", "test", "registered (UTC)"), rows),
        f"next: orchestrator models {shown}:VERSION   or   orchestrator promote {shown} VERSION",
    ]


def _config_label(config: dict[str, Any]) -> str:
    try:
        return "imported from PEFT" if IMPORTED in config else TrialSpec.from_config(config).label()
    except Exception:  # tags can be edited: a broken one must not stop the listing
        return ""


def version_document(detail: VersionDetail) -> JsonObject:
    """Return one version in full, for ``models NAME:VERSION --json``."""
    return {
        **_version_fields(detail.summary),
        "source": detail.source,
        "manifest": None if detail.manifest is None else detail.manifest.model_dump(mode="json"),
        "problem": detail.problem,
    }


def version_page(detail: VersionDetail) -> list[str]:
    """Format one version in full, or say why it can't be used."""
    summary, manifest = detail.summary, detail.manifest
    name = printable(summary.name)
    head = [
        f"{name} version {summary.version}"
        + (f" ({', '.join(summary.aliases)})" if summary.aliases else "")
    ]
    if manifest is None:
        return [
            *head,
            f"this version can't be used: {printable(detail.problem)}",
            f"next: orchestrator models {name}",
        ]
    facts: list[tuple[str, Any]] = [
        ("method", f"{manifest.method}: {_config_label(manifest.config)}"),
        (
            "base model",
            f"{manifest.base_model.id} ({manifest.base_model.revision}), "
            f"{manifest.base_model.model_type}",
        ),
        ("fingerprint", manifest.base_model.fingerprint),
        ("template", json.dumps(manifest.template, ensure_ascii=False)),
        ("conversations", _chat(manifest)),
        ("verbalizer", _verbalizer(manifest.verbalizer_map())),
        ("data", f"{manifest.data.path}, rows {manifest.data.rows}"),
        (
            "trained",
            f"{manifest.steps} steps, search {manifest.search}, trial {manifest.trial}, "
            f"{manifest.created_at}",
        ),
        *(
            (BASELINE_NAMES.get(key, key), metric_text(found))
            for key, found in manifest.baselines.items()
        ),
        ("tuned prompt", metric_text(manifest.metrics)),
        ("MLflow run", summary.run_id or ""),
    ]
    lines = [f"  {line}" for line in aligned(facts)]
    return [*head, *lines, f"next: orchestrator serve {name}:{summary.version}"]


def _chat(manifest: Manifest) -> str:
    if (chat := manifest.chat) is None:
        return "none: the prompt was tuned on bare text"
    system = f", system message {chat.system!r}" if chat.system else ""
    return f"in the base model's chat template ({chat.template_sha256[:12]}){system}"


def _verbalizer(mapping: dict[Any, str] | None) -> str:
    if mapping is None:
        return "none: the prompt generates text"
    return ", ".join(f"{label_text(label)} = {text!r}" for label, text in mapping.items())


# Exported folders


def export_page(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Say where an exported prompt is, and how to load it."""
    if document.get("format") == "tokens":
        return _token_page(document, folder)
    name = f"{document['name']}:{document['version']}"
    if document.get("format") == "embeds":
        return [
            f"{name} is in {folder}, as {document['num_virtual_tokens']} vectors and a client.",
            f"next: vllm serve {document['base_model']} --enable-prompt-embeds   "
            f"then   python {shlex.quote(str(folder / 'client.py'))} COLUMN=TEXT",
        ]
    card = [f"Its model card is {document['card']}."] if "card" in document else []
    card += [f"Note: {document['warning']}."] if "warning" in document else []
    place = str(folder)
    if repository := document.get("repository"):
        card.append(f"It is on the hub: {repository['url']}")
        place = repository["id"]
    return [
        f"{name} is in {folder}, as {document['peft_type']} of PEFT.",
        *card,
        f"next: PeftModel.from_pretrained(base, {place!r}) in Python",
        f"  or: orchestrator import {shlex.quote(str(folder))} --name NAME --job JOB   "
        "(into another registry)",
    ]


def _token_page(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Say which prompts a token folder holds, and what its head promises."""
    names = ", ".join(f"{one['name']}:{one['version']}" for one in document["prompts"])
    count = sum(one["num_virtual_tokens"] for one in document["prompts"])
    return [
        f"{names}: {folder} is {document['base_model']} with {count} virtual tokens.",
        HEADS[document["head"]["by"]],
        f"next: vllm serve {shlex.quote(str(folder))}   or   "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}); see its README.md",
    ]


HEADS = {
    "bias": "The model never produces them.",
    "normalization": "The model never produces them.",
    "avoided tokens": (
        "Greedy decoding never produces them, and transformers' generate never does; README.md "
        "says how unlikely they are elsewhere."
    ),
}


def import_page(document: Mapping[str, Any]) -> list[str]:
    """Say which version an imported prompt became, and what to do with it."""
    model = document["model"]
    made = f"{model['name']}:{model['version']}"
    next_step = (
        f"next: orchestrator inspect {made}   or   orchestrator serve {made}"
        if model["alias"] == CHAMPION
        else f"next: orchestrator evaluate {made} --data FILE   "
        f"then   orchestrator promote {model['name']} {model['version']}"
    )
    return [
        f"{made} holds {document['num_virtual_tokens']} virtual tokens of "
        f"{document['base_model']}.",
        next_step,
    ]
