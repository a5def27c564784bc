"""Evaluating registered prompts on data that they were not tuned on.

This measures domain shift, and the accuracy of several versions that vote. Metrics are computed as
in a search, with several prompts in one forward. Shapes: K prompts, B rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.artifact import PromptArtifact
from orchestrator.data.cells import cell_text
from orchestrator.data.dataset import load_split, rows_fingerprint
from orchestrator.data.encoding import Encoded, reference_texts
from orchestrator.data.outcomes.label_metrics import labelled_figures
from orchestrator.data.outcomes.rows import RowOutcomes, outcomes_of
from orchestrator.data.source_row import Row
from orchestrator.data.tables import table_suffix
from orchestrator.data.template import Template
from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.job.labels import by_meaning, label_key
from orchestrator.job.metrics import (
    Kind,
    Metric,
    choice_of,
    custom_function,
    is_custom,
    metric_named,
    names_of,
    preferred,
)
from orchestrator.job.spec import BaseModelSpec, DataFiles, DataSpec
from orchestrator.models.backbone import Backbone, default_device, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.registry import EvaluationRecord, Registry, VersionSummary, printable
from orchestrator.registry.aliases.gate import tagged_metric
from orchestrator.serving.engine.classify import answer_probs
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt, prompt_tensors
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.evaluate import evaluate, forward_tokens
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.out_of_memory import Room
from orchestrator.tuning.reports import confusion_counts, without_confusion
from orchestrator.utils.documents import JsonObject

Value = TypeVar("Value")
Metrics = dict[str, float]
FILE_SPLIT = "train"  # the split of a single file, as data sets name their only split
MAX_GROUPS = 100
NO_GROUP = "(empty)"  # the group of rows without text in the column


@dataclass(frozen=True)
class Question:
    """The data of an evaluation: one data set, optionally grouped by the values of a column."""

    data: str
    split: str = "test"
    by: str | None = None
    target: str | None = None
    references: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A version with everything that its evaluation needs."""

    summary: VersionSummary
    artifact: PromptArtifact
    prompt: ServedPrompt

    @property
    def decoding(self) -> Decoding | None:
        record = self.artifact.manifest.generation
        return Decoding(record.max_tokens, record.num_beams) if record else None

    @property
    def kind(self) -> tuple[object, ...]:
        """The key of versions that see the same tokens and can therefore share forwards."""
        it = self.artifact.manifest
        limits = it.max_input_tokens, it.max_target_tokens
        texts = it.template, it.target, it.verbalizer, it.cells, it.sentinel
        return *texts, it.chat, it.special_tokens_in_text, *limits, self.decoding


@dataclass(frozen=True)
class RowGroup:
    """A group of rows, as one version sees them, with a line of its own in the results.

    ``places`` are the indices of the group's rows among all rows.
    """

    label: str
    rows: list[Row]
    places: Sequence[int]


def evaluate_models(
    registry: Registry,
    models: Sequence[str],
    questions: Sequence[Question],
    ensemble: bool = False,
    base_model: str | None = None,
    log: bool = True,
    say: Callable[[str], None] = lambda text: None,
    metric: str | None = None,
    backbone: Backbone | None = None,
) -> JsonObject:
    """Evaluate versions on data sets; return the document of ``evaluate --json``.

    For each data set and each of its groups, the document has the metrics of every version, how
    much worse they are than on the version's own test split, and figures for each label.

    ``metric`` is the metric to compare by; by default the one that all versions were ranked by, or
    else the first of ``METRICS`` that all have. It may be a function of the user's own.

    With ``ensemble`` the versions also vote, all of them in one batch. With ``log`` the results are
    stored with each version. ``backbone`` is their base model, if it has been loaded. Raises
    BadInput for versions of different base models, for rows that lack a column or have a label that
    the prompt can't give, and for a metric that has no value.
    """
    summaries = [registry.resolve(model) for model in models]
    if len({(it.name, it.version) for it in summaries}) < len(summaries):
        raise BadInput("a version is named twice", "name each version once")
    artifacts = [PromptArtifact.load(registry.fetch(it.name, it.version)) for it in summaries]
    if metric is not None:
        _check_metric(metric, summaries, artifacts)
    read = [[_groups(artifact, question) for artifact in artifacts] for question in questions]
    if backbone is None:
        say("loading the base model")
        backbone = load_base_model(artifacts, base_model)
    loaded = [
        Loaded(
            summary,
            artifact,
            load_prompt(backbone, registry.fetch(summary.name, summary.version), summary.name, 0),
        )
        for summary, artifact in zip(summaries, artifacts, strict=True)
    ]
    if ensemble:
        _check_votes(loaded)
    encoded = [
        [_encoded(one, groups, question) for one, groups in zip(loaded, of_models, strict=True)]
        for question, of_models in zip(questions, read, strict=True)
    ]
    if metric == "roc_auc":
        _check_every_label(loaded, questions, encoded)
    targets = []
    for question, of_models, splits in zip(questions, read, encoded, strict=True):
        say(f"evaluating {len(loaded)} of {question.data}")
        targets += _targets(backbone, loaded, question, of_models, splits, ensemble, metric)
    return {
        **_document(loaded, targets, metric),
        "logged": log and _kept(registry, loaded, targets, say),
    }


def _check_metric(
    name: str, summaries: Sequence[VersionSummary], artifacts: Sequence[PromptArtifact]
) -> None:
    """Refuse a metric that is unknown, can't be imported, or that a version's task lacks."""
    kind = metric_named(name).kind
    if is_custom(name):
        custom_function(name, "--metric")
    for summary, artifact in zip(summaries, artifacts, strict=True):
        own: Kind = "texts" if artifact.manifest.verbalizer is None else "labels"
        if kind not in (own, "targets", "custom"):
            version = f"{printable(summary.name)}:{summary.version}"
            raise BadInput(
                f"--metric {name} judges {kind}, and {version} gives {own}",
                f"use {choice_of(names_of(own, 'targets'))}, or module:function",
            )


def _check_every_label(
    loaded: Sequence[Loaded],
    questions: Sequence[Question],
    encoded: Sequence[Sequence[Sequence[Encoded]]],
) -> None:
    """Refuse rows that lack a label: the area under its ROC curve has no value there."""
    for question, of_models in zip(questions, encoded, strict=True):
        for one, splits in zip(loaded, of_models, strict=True):
            present = set(splits[0].labels)
            labels = enumerate(one.prompt.labels)
            absent = [label for place, label in labels if place not in present]
            if absent:
                raise BadInput(
                    f"--metric roc_auc has no value on {question.data}, which has no row of label "
                    f"{', '.join(map(repr, absent[:5]))}",
                    "give rows of every label, or use another metric, such as macro_f1",
                )


def _kept(
    registry: Registry,
    loaded: Sequence[Loaded],
    targets: Sequence[Target],
    say: Callable[[str], None],
) -> bool:
    """Store the results with the versions; return False if the registry does not accept them.

    The user then still gets the computed results.
    """
    try:
        for place, one in enumerate(loaded):
            registry.log_evaluations(one.summary, [_record(target, place) for target in targets])
        return True
    except (BadInput, Unreachable) as error:
        say(f"not kept in the registry: {error}")
        return False


def load_base_model(artifacts: Sequence[PromptArtifact], base_model: str | None) -> Backbone:
    """Load the base model that all prompts were tuned for, perhaps from another place.

    Raises BadInput for prompts of different base models.
    """
    record = artifacts[0].manifest.base_model
    for artifact in artifacts[1:]:
        other = artifact.manifest.base_model
        if (other.fingerprint, other.quantization) != (record.fingerprint, record.quantization):
            raise BadInput(
                f"the versions are of different base models: {record.id} "
                f"({record.fingerprint[:12]}) and {other.id} ({other.fingerprint[:12]})",
                "evaluate them one after another",
            )
    spec = {
        "id": base_model or record.id,
        "revision": record.revision,
        "quantization": record.quantization,
    }
    return load_backbone(resolve_model(BaseModelSpec.model_validate(spec)), default_device())


# Rows


def _groups(artifact: PromptArtifact, question: Question) -> list[RowGroup]:
    """Load the rows in groups; the first group has all rows.

    Rows keep only the columns that the version's own data had.
    """
    data = _data_spec(artifact, question)
    by = [question.by] if question.by else []
    split = FILE_SPLIT if isinstance(data.path, DataFiles) else question.split
    rows = load_split(data, split, by)[: question.limit]
    seen = {*_columns(artifact, data)}
    cut: list[Row] = [{key: row[key] for key in row if key in seen} for row in rows]
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if question.by:
            found.setdefault(cell_text(row[question.by]) or NO_GROUP, []).append(place)
    if len(found) > MAX_GROUPS:
        raise BadInput(
            f"column {question.by!r} has {len(found)} values, more than {MAX_GROUPS}",
            "choose a column of few values",
        )
    parts = [
        RowGroup(label, [cut[place] for place in found[label]], found[label])
        for label in sorted(found)
    ]
    return [RowGroup("", cut, range(len(cut))), *parts]


def _columns(artifact: PromptArtifact, data: DataSpec) -> set[str]:
    return {
        *Template(artifact.manifest.template).columns,
        data.target,
        *([data.references] if data.references else []),
    }


def _data_spec(artifact: PromptArtifact, question: Question) -> DataSpec:
    """Describe the new rows with the version's own template, target and labels."""
    manifest, cells, file = (
        artifact.manifest,
        artifact.manifest.cells,
        Path(question.data).expanduser(),
    )
    chat = manifest.chat
    is_file = bool(table_suffix(file)) or file.exists()
    return DataSpec(
        path=DataFiles(train=question.data) if is_file else question.data,
        rename=dict(question.rename),
        template=manifest.template,
        target=question.target or manifest.target,
        messages=None if chat is None or question.target else chat.messages,
        chat=chat is not None,
        references=question.references,
        verbalizer=manifest.verbalizer_map(),
        empty=cells.empty if cells else "refuse",
    )


def _encoded(one: Loaded, groups: Sequence[RowGroup], question: Question) -> list[Encoded]:
    encoder, data = one.prompt.encoder, _data_spec(one.artifact, question)
    if encoder.verbalizer is not None:
        _check_labels(one, groups[0].rows, data.target)
    whole = encoder.encode(groups[0].rows, data.target)
    longest = max(whole.lengths)
    if one.decoding is not None:
        whole = replace(whole, references=reference_texts(groups[0].rows, data))
        longest = max(longest, max(map(len, whole.inputs)) + one.decoding.max_tokens)
    if (needed := longest + one.prompt.virtual_tokens) > one.prompt.context_length:
        raise BadInput(
            f"a row of {question.data} needs {needed} tokens with the prompt and the answer, "
            f"and the base model's context is {one.prompt.context_length}",
            "leave out such rows",
        )
    return [_part(whole, group.places) for group in groups]


def _part(whole: Encoded, places: Sequence[int]) -> Encoded:
    def chosen(values: list[Value]) -> list[Value]:
        return [values[place] for place in places] if values else []

    return Encoded(
        chosen(whole.inputs), chosen(whole.targets), chosen(whole.labels), chosen(whole.references)
    )


def _check_labels(one: Loaded, rows: Sequence[Row], target: str) -> None:
    known = one.prompt.labels
    keys = by_meaning(known)
    version = f"{printable(one.summary.name)}:{one.summary.version}"
    if len(keys) < len(known):
        raise BadInput(
            f"{version} was tuned with labels that mean the same: {list(known)}", "tune it again"
        )
    seen = {label_key(row[target]): row[target] for row in rows}
    strange = [label for key, label in seen.items() if key not in keys]
    if strange:
        shown = ", ".join(repr(label) for label in sorted(strange, key=repr)[:5])
        raise BadInput(
            f"column {target!r} holds {shown}; {version} answers {', '.join(map(repr, known))}",
            "choose the column of the labels with --target, or map it with --rename",
        )


def _check_votes(loaded: Sequence[Loaded]) -> None:
    if len(loaded) < 2:
        raise BadInput("one version can't vote", "name two or more versions")
    for one in loaded:
        if reason := one.prompt.why_no_labels:
            raise BadInput(
                f"{printable(one.summary.name)}:{one.summary.version} can't vote: it {reason}"
            )
        if by_meaning(one.prompt.labels).keys() != by_meaning(loaded[0].prompt.labels).keys():
            raise BadInput(
                "the versions have different labels and can't vote together", "leave out --ensemble"
            )


# Results


@dataclass(frozen=True)
class Target:
    """One line of the results table: a group of rows, and the metrics of every version on it."""

    question: Question
    label: str
    rows: int
    fingerprints: list[str]
    metrics: list[Metrics]
    classes: list[list[dict[str, Any]] | None]
    """Figures of each label by version; None for a version that generates text."""
    votes: Metrics | None
    outcomes: list[RowOutcomes | None]
    """What each version made of the rows."""


def _targets(
    backbone: Backbone,
    loaded: Sequence[Loaded],
    question: Question,
    groups: Sequence[Sequence[RowGroup]],
    splits: Sequence[Sequence[Encoded]],
    ensemble: bool,
    metric: str | None,
) -> list[Target]:
    """Evaluate every version on each group; ``groups`` and ``splits`` have a list per version."""
    found = []
    voted = _votes(backbone, loaded, question, groups, splits) if ensemble else []
    for place, group in enumerate(groups[0]):
        found_metrics = _metrics(backbone, loaded, [of[place] for of in splits], metric)
        metrics = [without_confusion(one) for one in found_metrics]
        pairs = zip(loaded, found_metrics, strict=True)
        classes = [_classes(one.prompt, own) for one, own in pairs]
        prints = [rows_fingerprint(of[place].rows) for of in groups]
        votes = voted[place] if voted else None
        kept = [outcomes_of(one) for one in found_metrics]
        found.append(
            Target(question, group.label, len(group.rows), prints, metrics, classes, votes, kept)
        )
    return found


def _classes(prompt: ServedPrompt, metrics: Metrics) -> list[dict[str, Any]] | None:
    """Compute precision, recall, F1 and support of each label from the counts in the metrics."""
    if prompt.encoder.verbalizer is None:
        return None
    labels = prompt.encoder.verbalizer.labels
    return labelled_figures(labels, confusion_counts(metrics, len(labels)))


def _metrics(
    backbone: Backbone,
    loaded: Sequence[Loaded],
    splits: Sequence[Encoded],
    metric: str | None,
) -> list[Metrics]:
    """Compute each version's metrics on its split, with the counts of its answers.

    Versions that see the same tokens share forwards.
    """
    found: list[Metrics] = [{}] * len(loaded)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for place, one in enumerate(loaded):
        kinds.setdefault(one.kind, []).append(place)
    for places in kinds.values():
        for place, metrics in zip(
            places,
            _alike(backbone, [loaded[it] for it in places], splits[places[0]], metric),
            strict=True,
        ):
            found[place] = metrics
    return found


def _alike(
    backbone: Backbone, loaded: Sequence[Loaded], split: Encoded, metric: str | None
) -> list[Metrics]:
    prompts = [prompt_tensors(one.artifact) for one in loaded]
    first, room = loaded[0], Room()
    threads = Threads.of(torch.get_num_threads(), backbone.model, backbone.device)

    def work(places: Sequence[int]) -> list[Metrics]:
        chosen, cores = (
            [prompts[place] for place in places],
            threads.together() if room.note else threads,
        )
        return evaluate(
            backbone,
            chosen,
            split,
            first.prompt.encoder,
            first.decoding,
            room.tokens,
            confusion=True,
            threads=cores,
            metric=metric,
        )

    found = room.each(len(prompts), work)
    if any(metrics is None for metrics in found):
        raise JobFailed("out of memory, even one row at a time", "use a larger machine")
    return [metrics for metrics in found if metrics is not None]


def _votes(
    backbone: Backbone,
    loaded: Sequence[Loaded],
    question: Question,
    groups: Sequence[Sequence[RowGroup]],
    splits: Sequence[Sequence[Encoded]],
) -> list[Metrics]:
    """Compute the accuracy of the majority vote on each group.

    All versions see a row in the same forward. In a tie, the label with the highest mean
    probability wins.
    """
    target, truths = question.target or loaded[0].artifact.manifest.target, groups[0][0].rows
    keys = [[label_key(label) for label in one.prompt.labels] for one in loaded]
    right: list[bool] = []
    prompts = max(one.prompt.virtual_tokens for one in loaded)
    longest = prompts + max(length for of in splits for length in of[0].lengths)
    size = max(1, forward_tokens(backbone) // (longest * len(loaded)))
    for start in range(0, len(truths), size):
        places = range(start, min(start + size, len(truths)))
        inputs = [of[0].inputs[row] for of in splits for row in places]
        probs = answer_probs(backbone, [one.prompt for one in loaded for _ in places], inputs)
        for offset, row in enumerate(places):
            said = [
                dict(zip(keys[number], probs[number * len(places) + offset], strict=True))
                for number in range(len(loaded))
            ]
            right.append(majority(said, keys[0]) == label_key(truths[row][target]))
    return [
        {"accuracy": sum(right[place] for place in group.places) / len(group.places)}
        for group in groups[0]
    ]


def majority(said: Sequence[Mapping[Any, float]], labels: Sequence[Any]) -> Any:
    """Return the label that most versions consider likeliest.

    In a tie, the label with the highest mean probability wins.
    """
    votes = Counter(max(labels, key=lambda label: probs[label]) for probs in said)
    return max(labels, key=lambda label: (votes[label], math.fsum(probs[label] for probs in said)))


def _record(target: Target, place: int) -> EvaluationRecord:
    question = target.question
    return EvaluationRecord(
        data=question.data,
        split=question.split,
        group=f"{question.by}={target.label}" if target.label else "",
        rows=target.rows,
        fingerprint=target.fingerprints[place],
        metrics=target.metrics[place],
        outcomes=target.outcomes[place],
    )


def _document(loaded: Sequence[Loaded], targets: Sequence[Target], asked: str | None) -> JsonObject:
    compared = _compared_by(loaded, targets, asked)
    metric = compared.name
    sources = [one.artifact.manifest.metrics.get("test", {}) for one in loaded]
    lines = []
    for target in targets:
        drops = [
            compared.sign * (source[metric] - metrics[metric])
            if metric in source and metric in metrics
            else None
            for metrics, source in zip(target.metrics, sources, strict=True)
        ]
        line: JsonObject = {
            "data": target.question.data,
            "split": target.question.split,
            "by": target.question.by,
            "group": target.label or None,
            "rows": target.rows,
            "metrics": target.metrics,
            "drop": drops,
            "classes": target.classes,
        }
        if target.votes:
            scores = [metrics["accuracy"] for metrics in target.metrics]
            line["ensemble"] = {
                **target.votes,
                "mean": sum(scores) / len(scores),
                "best": max(scores),
            }
        lines.append(line)
    models = [
        {
            "name": one.summary.name,
            "version": one.summary.version,
            "config": one.artifact.manifest.config,
            "source": {"data": one.artifact.manifest.data.path, "metrics": source},
        }
        for one, source in zip(loaded, sources, strict=True)
    ]
    return {"metric": metric, "models": models, "targets": lines}


def _compared_by(loaded: Sequence[Loaded], targets: Sequence[Target], asked: str | None) -> Metric:
    """Choose the metric that the table shows."""
    ranked_by = {tagged_metric(one.summary.tags) for one in loaded}
    common = ranked_by.pop() if len(ranked_by) == 1 else None
    if asked is not None:
        return common if common and common.name == asked else metric_named(asked)
    every = [set(metrics) for target in targets for metrics in target.metrics]
    shared = set.intersection(*every)
    if common is not None and common.name in shared:
        return common
    name = preferred(shared)
    assert name is not None  # every evaluation has a loss
    return metric_named(name)
