"""The result of a search: test the best trials, register or keep them, and describe the outcome."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.artifact import (
    SOFT,
    BaseModelRecord,
    GenerationRecord,
    Manifest,
    PromptArtifact,
    ReparameterizationRecord,
)
from orchestrator.data.designs import Design
from orchestrator.data.outcomes.label_metrics import labelled_figures
from orchestrator.data.outcomes.rows import RowOutcomes, outcomes_of
from orchestrator.errors import BadInput, NothingFound
from orchestrator.job.space import no_result
from orchestrator.job.spec import RegistrySpec
from orchestrator.models.nearest_words import nearest_words
from orchestrator.models.source import BaseModelInfo
from orchestrator.registry import CHAMPION, SEEDS_TAG, AliasOutcome
from orchestrator.search.context import SearchContext, StartedSearch
from orchestrator.search.mixture import (
    better_baseline,
    is_prompt,
    method_documents,
    method_metrics,
    to_test,
)
from orchestrator.search.mlflow_tags import outcome_tags, search_note
from orchestrator.search.plan.plan import device_hours
from orchestrator.search.prepare import cells_record, chat_record, data_record, verbalizer_entries
from orchestrator.search.resume_hints import naming_later_registration
from orchestrator.search.state.confirmation import (
    confirmed,
    confirmed_text,
    ranking,
    spread_metrics,
)
from orchestrator.search.state.trials import Outcome, TrialRecord
from orchestrator.search.tracking import SPLITS
from orchestrator.tuning.reports import EvaluationJob, confusion_counts, without_confusion

Metrics = dict[str, float]
SOON_S = 10.0  # the wait for MLflow before the user is told about it
REGISTRY_PATIENCE_S = 600.0
"""Longest wait of a completed search for MLflow, in seconds.

Nothing is lost when the wait runs out: `resume` registers the result later.
"""


@dataclass(frozen=True)
class BestTrial:
    """One of the best trials, with its metrics on the test split."""

    record: TrialRecord
    test: Metrics
    confusion: list[list[int]] | None = None
    """Counts by label and predicted label, of a task with a verbalizer."""
    outcomes: RowOutcomes | None = None
    """What the prompt made of each test row."""

    @property
    def metrics(self) -> dict[str, Metrics]:
        """The metrics by split."""
        return {"validation": self.record.metrics, "test": self.test}


@dataclass(frozen=True)
class Result:
    """What a search found: its trials, the best ones tested, and the baselines."""

    outcome: Outcome
    best_trials: Sequence[BestTrial]
    """The tested trials, best first: those to register, or the best trial alone. In a search that
    mixes methods, the best trial of each is among them."""
    baselines: dict[str, dict[str, Any]]
    model: BaseModelInfo

    @property
    def best(self) -> BestTrial:
        return self.best_trials[0]


def evaluate_best(search: StartedSearch, outcome: Outcome) -> list[BestTrial]:
    """Evaluate the best trials on the test split. Raises NothingFound if no trial has a result."""
    context = search.context
    ranked = ranking(outcome.records.values(), context.job.search)
    if not ranked:
        raise _nothing_found(context, outcome)
    context.progress.stage("evaluating the best prompt on the test split")
    best = to_test(ranked, context.job)
    measured = search.workers.evaluate(
        [EvaluationJob("test", trial.checkpoint, spec=trial.spec, confusion=True) for trial in best]
    )
    verbalizer = context.prepared.task.encoder.verbalizer
    evaluated = []
    for trial, metrics in zip(best, measured, strict=True):
        counts = confusion_counts(metrics, len(verbalizer.labels)) if verbalizer else None
        tested = BestTrial(trial, without_confusion(metrics), counts, outcomes_of(metrics))
        evaluated.append(tested)
    context.clock.mark("test")
    return evaluated


def _nothing_found(context: SearchContext, outcome: Outcome) -> NothingFound:
    notes = sorted({trial.note for trial in outcome.records.values() if trial.note})
    return NothingFound(
        f"{no_result(context.job.search, len(outcome.records))}: {'; '.join(notes)}",
        "lower the learning rates of search.space, or see the search's log with --verbose",
    )


def publish_result(search: StartedSearch, result: Result) -> dict[str, Any]:
    """Log the result, register or keep the best trials, and return the document of the search."""
    context, log = search.context, search.log
    log_result(search, result)
    with naming_later_registration(context.folder):
        if context.job.registry.register_top and not is_prompt(result.best.record, context.job):
            keep_baseline(search, result)
        registered = register_best(search, result)
    context.clock.mark("registry")
    costs = search_costs(context, result.outcome)
    log.parent_metrics(costs)
    log.parent_tags(outcome_tags(costs, context.plan.metrics() if context.plan else {}))
    return result_document(search, result, registered)


def log_result(search: StartedSearch, result: Result) -> None:
    """Log the best trial's metrics and the counts of trials by state to the search's run."""
    context, log, best = search.context, search.log, result.best
    for split, metrics in best.metrics.items():
        log.parent_metrics({f"best_{split}_{name}": value for name, value in metrics.items()})
    states = [trial.status for trial in result.outcome.records.values()]
    log.parent_tags({f"orchestrator.{state}": states.count(state) for state in sorted(set(states))})
    log.parent_tags({"orchestrator.best_trial": best.record.id})
    methods = _methods(context, result)
    log.parent_metrics(method_metrics(methods))
    found = confirmed(result.outcome.records.values(), context.job.search)
    for one in found:
        log.parent_metrics(spread_metrics(one))
    documents = [one.document(context.job.search) for one in found]
    text = confirmed_text(documents, context.job.search.metric) if found else ""
    if text:
        log.parent_tags({"orchestrator.confirmed": text})
    log.parent_tags(
        search_note(
            context.job,
            best.record.spec,
            best.metrics,
            result.baselines,
            context.prepared.warnings,
            text,
            {f"best of {each['method']}": each["metrics"] for each in methods if each["metrics"]},
        )
    )


def _methods(context: SearchContext, result: Result) -> list[dict[str, Any]]:
    """Describe the best trial of each method; empty for a search of one method."""
    if not context.job.mixes:
        return []
    trials = result.outcome.records.values()
    return method_documents(result.best_trials, trials, context.job)


def search_costs(context: SearchContext, outcome: Outcome) -> Metrics:
    """Return the search's seconds, device hours and trained steps.

    The seconds exclude those of measuring a plan. The device hours cover training and the test
    evaluation.
    """
    seconds = context.clock.seconds()
    device_seconds = seconds["training"] + seconds.get("test", 0.0)
    return {
        "seconds": seconds["total"] - seconds.get("plan", 0.0),
        "device_hours": device_hours(context.placement, device_seconds),
        "trained_steps": float(sum(trial.step for trial in outcome.records.values())),
    }


# Registration


def register_best(search: StartedSearch, result: Result) -> dict[str, Any] | None:
    """Register the best trials that an interrupted run has not registered already.

    They are registered from worst to best, so that the best trial becomes the newest version,
    which takes the alias. Returns None if there is nothing to register.
    """
    context, log = search.context, search.log
    job = context.job
    prompts = [trial for trial in result.best_trials if is_prompt(trial.record, job)]
    prompts = prompts[: job.registry.register_top]
    if not prompts:
        if job.mixes and job.registry.register_top:
            context.progress.note("no trial of a prompt has a result, so nothing is registered")
        return None
    context.progress.stage(f"registering {job.model_name}")
    _await_mlflow(search)
    registered = _already_registered(context)
    version = 0
    for trial in reversed(prompts):
        run_id = log.run_ids.get(trial.record.id, log.run_id)
        version = registered.get(run_id) or _register(context, result, trial, run_id)
    better = better_baseline(result.best.record, prompts[0].record, job)
    move = _second_best(context, version, better) if better else _contest(context, version)
    context.progress.note(move.reason)
    of_trial = {"trial": prompts[0].record.id} if job.mixes else {}
    return {"name": job.model_name, "version": version, **of_trial, **move.document()}


def _contest(context: SearchContext, version: int) -> AliasOutcome:
    """Give the version its alias, and make it champion if it earns that."""
    job = context.job
    return context.registry.auto_alias(
        job.model_name,
        version,
        job.registry.alias,
        job.search.metric,
        job.search.better,
        job.registry.promote_if,
    )


def _second_best(context: SearchContext, version: int, better: str) -> AliasOutcome:
    """Give the best prompt its alias, but leave the champion to a person: a baseline is better."""
    job, name = context.job, context.job.model_name
    alias = job.registry.alias
    if alias == CHAMPION:
        alias = RegistrySpec().alias
    context.registry.set_alias(name, alias, version, better, kind="search")
    kept = f", and is kept in {context.folder.artifact}" if job.registry.register_top else ""
    reason = (
        f"Version {version} is {alias}, not champion: {better}{kept}. "
        f"orchestrator promote {name} {version} makes the prompt champion all the same."
    )
    return AliasOutcome(alias, reason)


def _await_mlflow(search: StartedSearch) -> None:
    """Wait until MLflow has taken everything that was logged.

    A wait that runs out raises nothing: the next call of MLflow fails if it does not answer.
    """
    if not search.log.flush(SOON_S):
        search.context.progress.note(
            "MLflow has not taken all reports yet; waiting for it, "
            f"at most {REGISTRY_PATIENCE_S / 60:.0f} minutes"
        )
        search.log.flush(REGISTRY_PATIENCE_S)


def _already_registered(context: SearchContext) -> dict[str, int]:
    """Return the versions that this search registered before it was interrupted, by run id."""
    if context.saved is None:
        return {}
    try:
        versions = context.registry.versions(context.job.model_name)
    except BadInput:  # there is no such model yet
        return {}
    return {
        version.run_id: version.version
        for version in versions
        if version.run_id and version.tags.get("search") == context.id
    }


def _register(context: SearchContext, result: Result, trial: BestTrial, run_id: str) -> int:
    """Register a trial's best prompt, and return its version."""
    tensors = {name: tensor.float().numpy() for name, tensor in _best_tensors(trial.record).items()}
    soft = tensors.get(SOFT)
    manifest = prompt_manifest(context, result, trial)
    with tempfile.TemporaryDirectory() as folder:
        artifact = PromptArtifact(tensors, manifest).save(Path(folder) / "prompt")
        return context.registry.register(
            artifact,
            context.job.model_name,
            run_id,
            metric=context.job.search.metric,
            better=context.job.search.better,
            example=context.prepared.rows.test[0],
            nearest=[] if soft is None else nearest_words(context.prepared.source, soft, 3),
            outcomes=trial.outcomes,
            tags=seed_tags(result.outcome, trial.record),
        )


def seed_tags(outcome: Outcome, trial: TrialRecord) -> dict[str, Any]:
    """Return the tag with the spread of a trial's configuration over seeds; empty without one."""
    if not (spread := outcome.over_seeds(trial)):
        return {}
    return {SEEDS_TAG: {**spread, "fresh": bool(trial.spec.confirms)}}


def _best_tensors(trial: TrialRecord) -> dict[str, Any]:
    """Return the tensors of the trial's best evaluation, by name."""
    from orchestrator.tuning.checkpoint import Checkpoint

    assert trial.checkpoint is not None  # a ranked trial has reported
    return Checkpoint.from_bytes(trial.checkpoint).best()


def prompt_manifest(context: SearchContext, result: Result, trial: BestTrial) -> Manifest:
    """Describe a trial's prompt: how it is used, what it was tuned on, and how good it is."""
    data, task = context.job.data, context.prepared.task
    record = trial.record
    method = task.method_of(record.spec)
    return Manifest(
        method=method.name,
        num_virtual_tokens=record.spec.num_virtual_tokens,
        config=replace(record.spec, method="").config(),
        reparameterization=ReparameterizationRecord(
            type=method.reparameterization, hidden_size=method.hidden_size
        ),
        template=data.template,
        target=data.target,
        verbalizer=verbalizer_entries(task.encoder),
        cells=cells_record(data),
        sentinel=data.sentinel,
        chat=chat_record(task.encoder),
        special_tokens_in_text=data.special_tokens_in_text,
        max_input_tokens=data.max_input_tokens,
        max_target_tokens=data.max_target_tokens,
        base_model=BaseModelRecord(**asdict(result.model)),
        data=data_record(data, context.prepared.rows),
        metrics=trial.metrics,
        baselines={
            name: {split: baseline[split] for split in SPLITS}
            for name, baseline in result.baselines.items()
        },
        generation=GenerationRecord(**asdict(task.decoding)) if task.decoding else None,
        steps=record.best_step,
        search=context.id,
        trial=record.id,
        orchestrator_version=__version__,
    )


def keep_baseline(search: StartedSearch, result: Result) -> None:
    """Keep the result of a baseline method in the search's folder and its MLflow run.

    Such a result is not a prompt, so it cannot be registered.
    """
    from orchestrator.tuning.baselines.store import save_result

    context, log, trial = search.context, search.log, result.best.record
    context.progress.stage("keeping the result")
    folder = context.folder.artifact
    # The folder exists if the search was interrupted here before.
    shutil.rmtree(folder, ignore_errors=True)
    description = _baseline_description(context, result)
    save_result(folder, trial.spec, _best_tensors(trial), context.prepared.source, description)
    _await_mlflow(search)
    files = {f"baseline/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    context.registry.log_files(log.run_ids.get(trial.id, log.run_id), files)


def _baseline_description(context: SearchContext, result: Result) -> dict[str, Any]:
    """Describe the result of a baseline method, in JSON's types."""
    data, trial = context.job.data, result.best.record
    chat = chat_record(context.prepared.task.encoder)
    description = {
        "method": context.prepared.task.method_of(trial.spec).name,
        "base_model": asdict(result.model),
        "template": trial.spec.template or data.template,
        "target": data.target, "verbalizer": data.verbalizer, "sentinel": data.sentinel,
        "chat": chat.model_dump() if chat else None,
        "metrics": result.best.metrics, "costs": asdict(trial.costs),
        "steps": trial.best_step, "search": context.id, "trial": trial.id,
        "orchestrator_version": __version__,
    }  # fmt: skip
    designs = context.prepared.task.designs
    if designs and description["method"] == "prompt_design":
        description["demonstrations"] = designs.text(Design.of(trial.spec))
    return description


# The document


def result_document(
    search: StartedSearch, result: Result, registered: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the document that ``run --json`` prints."""
    context, best = search.context, result.best
    document: dict[str, Any] = {
        "search": context.id,
        "status": "succeeded",
        "trials": [trial.document() for trial in result.outcome.records.values()],
        "best": _best_document(context, result),
        # Not part of "best", which is the same for the same seed.
        "costs": asdict(best.record.costs),
        "baselines": result.baselines,
        "model": registered,
    }
    if methods := _methods(context, result):
        document["methods"] = methods
    settings = context.job.search
    if found := confirmed(result.outcome.records.values(), settings):
        document["confirmed"] = [one.document(settings) for one in found]
    if context.folder.artifact.is_dir():
        document["artifact"] = str(context.folder.artifact)
    document |= {
        "mlflow": {"tracking_uri": context.registry.display_uri, "run_id": search.log.run_id},
        "warnings": list(context.prepared.warnings),
        "seconds": context.clock.seconds(),
    }
    if context.plan:
        document["plan"] = context.plan.document()
    current_places = {name: place.shown() for name, place in search.workers.places().items()}
    return {**document, "workers": {**result.outcome.places, **current_places}}


def _best_document(context: SearchContext, result: Result) -> dict[str, Any]:
    best = result.best
    document: dict[str, Any] = {
        "trial": best.record.id,
        "config": best.record.spec.config(),
        "metrics": best.metrics,
    }
    if seeds := result.outcome.over_seeds(best.record):
        document["seeds"] = seeds
    if (verbalizer := context.prepared.task.encoder.verbalizer) and best.confusion is not None:
        labels = list(verbalizer.labels)
        document["confusion"] = {"labels": labels, "counts": best.confusion}
        document["classes"] = labelled_figures(labels, best.confusion)
    return document
