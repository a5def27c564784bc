"""The gate, as pure functions.

They decide whether a prompt can be served in another's place, and which of two prompts is better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.artifact import Manifest
from orchestrator.data.outcomes.confidence import SIGNIFICANT, Confidence, confidence
from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.job.labels import by_meaning, spelled
from orchestrator.job.metrics import (
    BY_NAME,
    Better,
    Metric,
    compares_texts,
    is_custom,
    metric_named,
    names_of,
    preferred,
)
from orchestrator.job.spec import PromoteIf, template_columns

METRIC_TAG = "orchestrator.metric"
"""A version's tag: the metric that its search ranked trials by."""
EVALUATION_TAG = "orchestrator.evaluation."
"""A version's tag, followed by the rows' fingerprint: the results of ``evaluate`` on them, as JSON.
"""
BETTER_TAG = "orchestrator.metric_better"
"""A version's tag: the direction in which METRIC_TAG's metric improves, max or min."""


@dataclass(frozen=True)
class ComparedVersion:
    """The manifest and the tags of a version, as the gate compares them.

    The tags hold the results of later evaluations.
    """

    manifest: Manifest
    tags: Mapping[str, str]
    outcomes: Callable[[str], RowOutcomes | None] = lambda fingerprint: None
    """Reads the outcomes of the rows of a fingerprint; returns None if they were not kept."""

    def results(self) -> dict[str, dict[str, float]]:
        """Map the fingerprint of each set of evaluated rows to the metrics on it.

        The version's own test split comes first.
        """
        own, data = self.manifest.metrics.get("test"), self.manifest.data
        found = {data.test_fingerprint or data.fingerprint: own} if own else {}
        for key, text in self.tags.items():
            if key.startswith(EVALUATION_TAG) and (metrics := _numbers(text)):
                found.setdefault(key.removeprefix(EVALUATION_TAG), metrics)
        return found


class Verdict(NamedTuple):
    """The gate's decision between a new prompt and the champion."""

    won: bool
    reason: str
    """A clause about the new prompt."""
    confidence: Confidence | None = None
    """How sure the difference is; None if it was not tested."""
    compared: bool = False
    """True if the metric's two values were compared."""


def _numbers(text: str) -> dict[str, float]:
    try:
        metrics = json.loads(text)["metrics"]
        return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    except (ValueError, KeyError, TypeError, AttributeError):  # users can edit tags
        return {}


def unsound(new: Manifest) -> list[str]:
    """List the reasons that no server can serve the prompt; empty if there are none.

    Its tensors are not checked here but when it is fetched.
    """
    found = []
    answer = new.generation.max_tokens if new.generation else 1
    needed = new.num_virtual_tokens + 1 + answer
    if needed > (context := new.base_model.context_length):
        found.append(
            f"{new.num_virtual_tokens} virtual tokens, an input and an answer of {answer} don't "
            f"fit into the base model's context of {context}"
        )
    if not template_columns(new.template):
        found.append(f"its template {new.template[:60]!r} names no column")
    if new.verbalizer is not None and not new.verbalizer:
        found.append("its verbalizer is empty")
    return found


def differences(new: Manifest, holder: Manifest) -> list[str]:
    """List the differences that would break the holder's server or clients; empty if none."""
    mine, other = _fit(new), _fit(holder)
    found = [
        f"{what} is {mine[what]:.16}, not {other[what]:.16}"
        for what in mine
        if mine[what] != other[what]
    ]
    if found and new.base_model.id != holder.base_model.id:
        found.insert(0, f"base model is {new.base_model.id}, not {holder.base_model.id}")
    columns, labels = (_columns(new), _columns(holder)), (_labels(new), _labels(holder))
    if columns[0] != columns[1]:
        found.append(_difference("template takes the columns", *columns))
    if (
        by_meaning(new.verbalizer_map() or {}).keys()
        != by_meaning(holder.verbalizer_map() or {}).keys()
    ):
        found.append(_difference("answers are the labels", *labels))
    return found


def _difference(what: str, ours: Sequence[str], theirs: Sequence[str]) -> str:
    return f"{what} {', '.join(ours) or 'none'}, not {', '.join(theirs) or 'none'}"


def _fit(manifest: Manifest) -> dict[str, str]:
    base = manifest.base_model
    return {
        "base model fingerprint": base.fingerprint,
        "tokenizer digest": base.tokenizer_digest,
        "hidden size": str(base.hidden_size),
    }


def _columns(manifest: Manifest) -> list[str]:
    return sorted(set(template_columns(manifest.template)))


def _labels(manifest: Manifest) -> list[str]:
    """Return the labels as JSON spells them; none for a prompt that generates text."""
    return sorted(spelled(label) for label in manifest.verbalizer_map() or {})


def comparison_metric(new: ComparedVersion, holder: ComparedVersion) -> tuple[str, Better]:
    """Choose the metric that two versions are compared by, and its direction.

    It is the metric of the new version's search, or else the first of ``METRICS`` that both test
    results have.
    """
    if metric := tagged_metric(new.tags):
        return metric.name, metric.better
    mine, other = (set(it.manifest.metrics.get("test", {})) for it in (new, holder))
    name = preferred(mine & other) or names_of()[0]
    return name, metric_named(name).better


def tagged_metric(tags: Mapping[str, str]) -> Metric | None:
    """Return the metric that a version's search ranked by; None if no tag names one."""
    name = tags.get(METRIC_TAG, "")
    if name not in BY_NAME and not is_custom(name):
        return None
    return metric_named(name, "min" if tags.get(BETTER_TAG) == "min" else "max")


def verdict(
    new: ComparedVersion,
    champion: ComparedVersion,
    metric: str,
    better: Better,
    promote_if: PromoteIf = "better",
) -> Verdict:
    """Tell whether the new prompt beats the champion on the same test rows."""
    if found := differences(new.manifest, champion.manifest):
        return Verdict(False, f"its {found[0]}")
    compared = metric_named(metric, better)
    has_labels = new.manifest.verbalizer is not None
    same_decoding = new.manifest.generation == champion.manifest.generation
    if compares_texts(compared, has_labels) and not same_decoding:
        return Verdict(False, "the champion's texts were generated with other settings")
    mine, other = new.results(), champion.results()
    shared = [rows for rows in mine if rows in other]
    if not shared:
        if not mine or not other:
            return Verdict(False, f"{'the champion' if mine else 'it'} has no test {metric}")
        return Verdict(False, "the champion was tested on other data")
    known = [rows for rows in shared if metric in mine[rows] and metric in other[rows]]
    if not known:
        lacking = "the champion" if metric in mine[shared[0]] else "it"
        return Verdict(False, f"{lacking} has no test {metric}")
    rows = known[0]
    scores = mine[rows][metric], other[rows][metric]
    tested = _compared(new, champion, rows, metric)
    return _decided(compared, scores, tested, promote_if)


def _compared(
    new: ComparedVersion, champion: ComparedVersion, rows: str, metric: str
) -> Confidence | None:
    """Test the difference on the rows of a fingerprint; None without the outcomes of both."""
    mine, other = new.outcomes(rows), champion.outcomes(rows)
    return None if mine is None or other is None else confidence(mine, other, metric)


def _decided(
    metric: Metric, scores: tuple[float, float], found: Confidence | None, promote_if: PromoteIf
) -> Verdict:
    """Decide by the two values and the test of their difference, and say so in words."""
    is_better = metric.is_better(*scores)
    numbers = f"its test {metric.name} is {scores[0]:.4g}, the champion's {scores[1]:.4g}"
    if found is None:
        unknown = "the confidence is unknown, without both versions' outcomes on the same rows"
        if is_custom(metric.name):
            unknown = "the confidence is unknown, as of any function of the user's own"
        won = is_better and promote_if == "better"
        return Verdict(won, f"{numbers}; {unknown}", compared=True)
    reason = f"{numbers}: {found.clause()}"
    if scores[0] != scores[1] and not found.is_significant:
        reason += f"; the difference is within noise (p is not below {SIGNIFICANT:g})"
    won = is_better and (promote_if == "better" or found.is_significant)
    return Verdict(won, reason, found, compared=True)
