"""Results as text lines for people and as documents for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import IMPORTED
from orchestrator.progress import duration
from orchestrator.registry import ModelSummary, VersionDetail, VersionSummary, printable
from orchestrator.space import TrialSpec
from orchestrator.spec import JobSpec
from orchestrator.submission import LABEL_PREFIX, NAME_KEY, SEARCH_KEY, USER_KEY, Job
from orchestrator.wording import counted

if TYPE_CHECKING:
    from orchestrator.search.plan import Plan

BASELINES = {"zero_shot": "without a prompt", "few_shot": "a few examples", "instruction": "written instruction"}
START_HERE = "nothing is registered yet\nnext: orchestrator run jobs/quickstart.yaml"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns, as wide as their content; a registry's texts are shown escaped."""
    cells = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def metric_text(metrics: Mapping[str, Any] | None, split: str = "test") -> str:
    """accuracy 0.970, exact_match 0.970, loss 0.081; what somebody put there that is no number is left out."""
    found = (metrics or {}).get(split)
    numbers = found.items() if isinstance(found, dict) else ()
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers if isinstance(value, int | float))


# Searches


def run_summary(document: dict[str, Any], spec: JobSpec) -> list[str]:
    """What a finished search means for the person who started it."""
    best, metric = document["best"], spec.search.metric
    rows = [
        (BASELINES[name], f"{found['validation'][metric]:.3f}", f"{found['test'][metric]:.3f}")
        for name, found in document["baselines"].items()
    ]
    tuned = best["metrics"]
    rows.append((spec.result_name, f"{tuned['validation'][metric]:.3f}", f"{tuned['test'][metric]:.3f}"))
    seconds = document["seconds"]
    lines = [
        f"search {document['search']}: {counted(len(document['trials']), 'trial')} in {duration(seconds['training'])}, "
        f"{duration(seconds['total'])} in all",
        f"best trial {best['trial']}: {TrialSpec.from_config(best['config']).label()}",
        "",
        *table((metric, "validation", "test"), rows),
        "",
    ]
    if kept := document.get("artifact"):
        text = (
            f"kept in {kept} and with the search's run; a baseline is no prompt, and is neither registered nor served"
        )
        return [*lines, text, f"next: orchestrator report {document['search']} OTHER...   (beside other searches)"]
    return [*lines, *_registered(document["model"])]


def _registered(model: dict[str, Any] | None) -> list[str]:
    if model is None:
        return ["nothing was registered (registry.register_top is 0)"]
    alias = f", alias {model['alias']}" if model["alias"] else ""
    steps = [f"orchestrator serve {model['name']}", "orchestrator ui"]
    if model["alias"] != "champion":
        steps.insert(0, f"orchestrator promote {model['name']} {model['version']}")
    return [f"registered {model['name']} version {model['version']}{alias}", f"next: {'   or   '.join(steps)}"]


# Plans


def plan_page(plan: Plan, spec: JobSpec) -> list[str]:
    """What a search will take, with what cannot fit."""
    placement, measured, found = plan.placement, plan.measured, plan.forecast
    pace, packed = measured.pace, f"{_count(placement.trials_per_worker, 'trial')} packed"
    reached = ", ".join(
        f"{step} steps: {_number(trials)}" for step, trials in zip(found.rungs, found.reached, strict=True)
    )
    low, high = found.spread
    spread = f" ({duration(low)} to {duration(high)})" if round(high) > round(low) else ""
    facts = [
        ("trials", f"{plan.trials}; expected to reach {reached} ({spec.search.scheduler})"),
        ("steps", f"about {found.steps:.0f} of at most {plan.most_steps}"),
        (
            "slots",
            f"{placement.slots}: {_count(placement.workers, 'worker')} of {_count(placement.trials_per_worker, 'slot')}"
            f", {_count(placement.threads, 'thread')} each, on {measured.device}",
        ),
        (
            "memory",
            f"about {_gigabytes(measured.usual)} a worker, {_gigabytes(measured.peak)} with the longest rows and "
            f"prompts alone: {_gigabytes(measured.idle)} with the base model loaded "
            f"(its weights {_gigabytes(measured.weights)}) and {_gigabytes(plan.slot)} a slot; there is "
            f"{_gigabytes(measured.room)}",
        ),
        ("step", f"{_milliseconds(pace.step_packed)} of {packed}, {_milliseconds(pace.step_alone)} alone"),
        (
            "evaluation",
            f"{_milliseconds(pace.evaluation_packed)} of {packed}, {_milliseconds(pace.evaluation_alone)} alone",
        ),
        ("search", f"about {duration(plan.seconds['search'])}{spread}, {plan.device_hours:.3g} device hours in all"),
        ("in all", f"about {duration(plan.seconds['total'])}: " + _parts(plan.seconds)),
    ]
    width = max(len(key) for key, _ in facts)
    return [
        *(f"{key.ljust(width)}  {value}" for key, value in facts),
        *(f"warning: {text}" for text in plan.warnings),
    ]


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


# Jobs on a cluster


def jobs_document(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return [
        {
            "id": job.id,
            "status": job.status,
            "name": job.metadata.get(NAME_KEY),
            "search": job.metadata.get(SEARCH_KEY),
            "user": job.metadata.get(USER_KEY),
            "labels": _labels(job),
            "submitted": _moment(job.started),
            "ended": _moment(job.ended),
            "seconds": None if job.seconds is None else round(job.seconds, 3),
            "exit_code": job.exit_code,
        }
        for job in jobs
    ]


def jobs_table(jobs: Sequence[Job]) -> list[str]:
    if not jobs:
        return ["no job was submitted to this cluster", "next: orchestrator submit JOB --address URL"]
    rows = [
        (
            job.id,
            job.status,
            f"{_moment(job.started) or '':.16}".replace("T", " "),
            "" if job.seconds is None else duration(job.seconds),
            job.metadata.get(USER_KEY, ""),
            " ".join(f"{name}={value}" for name, value in _labels(job).items()),
        )
        for job in jobs
    ]
    return [
        *table(("job", "status", "submitted (UTC)", "took", "by", "labels"), rows),
        "next: orchestrator logs JOB --follow   or   orchestrator stop JOB",
    ]


def _labels(job: Job) -> dict[str, str]:
    found = job.metadata.items()
    return {name.removeprefix(LABEL_PREFIX): value for name, value in found if name.startswith(LABEL_PREFIX)}


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def request_page(document: Mapping[str, Any]) -> list[str]:
    """What ``submit`` would send."""
    environment = document["runtime_env"]
    code = environment["py_modules"]
    facts: list[tuple[str, str]] = [
        ("to", document["address"]),
        ("job", document["submission_id"]),
        ("runs", document["entrypoint"]),
        *(("packs", f"{file['from']} as {file['name']}, {file['bytes']} bytes") for file in environment["working_dir"]),
        ("code", f"{code['orchestrator']} files of this orchestrator" if code else "the one of the cluster's image"),
        *(("needs there", path) for path in document["on_the_cluster"]),
        *(("installs", line) for line in environment["pip"] or ()),
        *(("sets", f"{name}={value}") for name, value in environment["env_vars"].items()),
        *(("says", f"{name}={value}") for name, value in document["metadata"].items()),
        *(("note", text) for text in document["notes"]),
    ]
    width = max(len(key) for key, _ in facts)
    return [f"{key.ljust(width)}  {printable(value)}" for key, value in facts] + ["nothing was sent"]


# Reading a prompt


def inspection_page(document: Mapping[str, Any]) -> list[str]:
    """Each virtual token with its neighbours, or each layer of a prefix with its lengths; how far they drifted."""
    name = printable(f"{document['name']}:{document['version']}")
    soft = bool(document["tokens"])
    rows = [_token_row(token) for token in document["tokens"]] + [_layer_row(layer) for layer in document["layers"]]
    legend = (
        f"nearest: vocabulary tokens by cosine distance; a token of the vocabulary has norm "
        f"{document['vocabulary_norm']:.3g} on average"
        if soft
        else "a prefix has keys and values and no embeddings: mean norms of a head's, next to those of real tokens"
    )
    drift = f"no drift from the start: {printable(document['no_drift'])}" if document["no_drift"] else DRIFT
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
        f"{json.dumps(one['token'], ensure_ascii=False)} {one['distance']:.3f}" for one in token["nearest"]
    )
    return token["place"], f"{token['norm']:.3g}", *_drift_cells(token["drift"]), near


def _layer_row(layer: Mapping[str, Any]) -> tuple[Any, ...]:
    norms = (layer[key] for key in ("key_norm", "real_key_norm", "value_norm", "real_value_norm"))
    return layer["site"], layer["layer"], *(f"{norm:.3g}" for norm in norms), *_drift_cells(layer["drift"])


def _drift_cells(drift: Mapping[str, float] | None) -> tuple[str, str]:
    if drift is None:
        return "", ""
    moved = f"{drift['norm'] / drift['start_norm']:.2f}" if drift["start_norm"] else "from 0"
    return f"{drift['cosine']:.3f}", moved


# Registry


def models_document(models: Sequence[ModelSummary]) -> list[dict[str, Any]]:
    return [asdict(model) for model in models]


def models_table(models: Sequence[ModelSummary]) -> list[str]:
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
    return [*table(("model", "newest", "aliases", "champion on test"), rows), "next: orchestrator models NAME"]


def _aliases(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))


def versions_document(name: str, versions: Sequence[VersionSummary]) -> dict[str, Any]:
    return {"name": name, "versions": [_version_fields(version) for version in versions]}


def _version_fields(version: VersionSummary) -> dict[str, Any]:
    fields = asdict(version)
    fields.pop("tags")
    return fields


def versions_table(name: str, versions: Sequence[VersionSummary]) -> list[str]:
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
    except Exception:  # whoever may edit tags may put anything here, and a listing goes on
        return ""


def version_document(detail: VersionDetail) -> dict[str, Any]:
    return {
        **_version_fields(detail.summary),
        "source": detail.source,
        "manifest": None if detail.manifest is None else detail.manifest.model_dump(mode="json"),
        "problem": detail.problem,
    }


def version_page(detail: VersionDetail) -> list[str]:
    """Everything a version says about itself."""
    summary, manifest = detail.summary, detail.manifest
    name = printable(summary.name)
    head = [f"{name} version {summary.version}" + (f" ({', '.join(summary.aliases)})" if summary.aliases else "")]
    if manifest is None:
        return [*head, f"this version can't be used: {printable(detail.problem)}", f"next: orchestrator models {name}"]
    facts: list[tuple[str, Any]] = [
        ("method", f"{manifest.method}: {_config_label(manifest.config)}"),
        ("base model", f"{manifest.base_model.id} ({manifest.base_model.revision}), {manifest.base_model.model_type}"),
        ("fingerprint", manifest.base_model.fingerprint),
        ("template", json.dumps(manifest.template, ensure_ascii=False)),
        ("verbalizer", _verbalizer(manifest.verbalizer_map())),
        ("data", f"{manifest.data.path}, rows {manifest.data.rows}"),
        ("trained", f"{manifest.steps} steps, search {manifest.search}, trial {manifest.trial}, {manifest.created_at}"),
        *((BASELINES.get(key, key), metric_text(found)) for key, found in manifest.baselines.items()),
        ("tuned prompt", metric_text(manifest.metrics)),
        ("MLflow run", summary.run_id or ""),
    ]
    width = max(len(key) for key, _ in facts)
    lines = [f"  {key.ljust(width)}  {printable(str(value))}" for key, value in facts]
    return [*head, *lines, f"next: orchestrator serve {name}:{summary.version}"]


def _verbalizer(mapping: dict[Any, str] | None) -> str:
    if mapping is None:
        return "none: the prompt generates text"
    return ", ".join(f"{label} = {text!r}" for label, text in mapping.items())
