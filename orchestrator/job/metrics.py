"""The metrics that trials, versions and evaluations are compared by: the only list of them.

The job spec and its schema, the ranking, the gate, ``evaluate``, messages and the table in
docs/metrics.md take names, directions and ranges from here. The numbers are computed in
``orchestrator.tuning``. A metric of the user's own is named ``module:function``.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from orchestrator.errors import BadInput, JobFailed

Better: TypeAlias = Literal["max", "min"]
Kind: TypeAlias = Literal["labels", "texts", "targets", "custom"]
CUSTOM_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
ARGUMENTS = ("predictions", "references", "scores")
"""What a metric of the user's own is called with."""
UNBOUNDED = 1e30
"""A value beyond all results. It is finite, because schedulers can't compare infinities."""


@dataclass(frozen=True)
class Metric:
    """A metric, with all that is needed to compare two values of it."""

    name: str
    kind: Kind
    """The task that it judges: labels of a verbalizer, generated texts, or the target's tokens,
    which every task has."""
    meaning: str
    """The definition, as a clause for the documentation."""
    better: Better = "max"
    lowest: float = 0.0
    highest: float = 1.0
    needs_scores: bool = False
    """True if it is computed from the probabilities of all rows, not from counts."""

    @property
    def sign(self) -> float:
        """Factor that makes higher values better."""
        return 1.0 if self.better == "max" else -1.0

    @property
    def worst(self) -> float:
        """A finite value that no result is worse than."""
        return self.lowest if self.better == "max" else min(self.highest, UNBOUNDED)

    @property
    def range_text(self) -> str:
        """The values that it can have, as the end of a sentence."""
        if math.isinf(self.highest):
            return f"it is at least {self.lowest:g}"
        return f"it lies between {self.lowest:g} and {self.highest:g}"

    def is_better(self, value: float, other: float) -> bool:
        return self.sign * value > self.sign * other


METRICS: tuple[Metric, ...] = (
    Metric("accuracy", "labels", "share of rows whose likeliest label is the right one"),
    Metric("macro_f1", "labels", "mean of the classes' F1, each class counting the same"),
    Metric("weighted_f1", "labels", "mean of the classes' F1, weighted by their rows"),
    Metric("mcc", "labels", "Matthews correlation of right and given labels", lowest=-1.0),
    Metric(
        "roc_auc", "labels",
        "area under the ROC curve: of the second label where there are two, otherwise the mean "
        "over each label against the rest",
        needs_scores=True,
    ),
    Metric(
        "ece", "labels",
        "expected calibration error: distance between the likeliest label's probability and the "
        "share of right rows, over 15 bins of equal width",
        better="min",
    ),
    Metric("rouge_l", "texts", "F-measure of ROUGE-L with the best reference, averaged over rows"),
    Metric(
        "f1", "texts",
        "F1 over the words of a generated text, as in SQuAD; not the F1 of labels, which is "
        "macro_f1 or weighted_f1",
    ),
    Metric("bleu", "texts", "corpus BLEU as of sacreBLEU, divided by 100"),
    Metric(
        "exact_match", "targets",
        "share of rows where greedy decoding gives exactly the target's tokens",
    ),
    Metric("loss", "targets", "mean negative log-likelihood of the target's tokens", better="min",
           highest=math.inf),
)  # fmt: skip
"""All metrics, in the order in which tables and the gate prefer them."""

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}

if TYPE_CHECKING:
    BuiltinMetric: TypeAlias = str
else:
    BuiltinMetric = Literal[tuple(BY_NAME)]
CustomMetric: TypeAlias = Annotated[str, Field(pattern=CUSTOM_PATTERN)]


def is_custom(name: str) -> bool:
    """Tell whether a name stands for a function of the user's own."""
    return ":" in name


def metric_named(name: str, better: Better | None = None) -> Metric:
    """Return the metric of a name; ``better`` is the direction of a metric of the user's own.

    Raises BadInput for an unknown name.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if is_custom(name):
        meaning, bound = "a function of the user's own", UNBOUNDED
        return Metric(name, "custom", meaning, better or "max", -bound, bound, needs_scores=True)
    raise BadInput(f"metric {name!r} is unknown", f"use {', '.join(BY_NAME)} or module:function")


def names_of(*kinds: Kind) -> list[str]:
    """List the metrics of these kinds, or all of them."""
    return [metric.name for metric in METRICS if not kinds or metric.kind in kinds]


def choice_of(names: Sequence[str]) -> str:
    """Write names as a choice, for instance "bleu, rouge_l or f1"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def compares_texts(metric: Metric, has_labels: bool) -> bool:
    """Tell whether texts are generated for a metric.

    A metric of the user's own judges labels if the task has them, and texts otherwise.
    """
    if metric.kind == "custom":
        return not has_labels
    return metric.kind == "texts"


def preferred(available: Iterable[str]) -> str | None:
    """Return the first metric that is available, in the order of METRICS."""
    names = set(available)
    return next((name for name in BY_NAME if name in names), None)


# Metrics of the user's own

CustomFunction: TypeAlias = Callable[[Any, Any, Any], Any]


class MetricFailed(JobFailed):
    """A metric of the user's own raised an error, or returned something that is no number."""


def custom_function(name: str, key: str = "search.metric") -> CustomFunction:
    """Import the function that ``module:function`` names.

    ``key`` is the setting that names it. Raises BadInput if it can't be imported, or can't be
    called with predictions, references and scores.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's own may raise anything
        raise BadInput(
            f"{key}: {name} can't be imported: {type(error).__name__}: {error}",
            f"install {module_name}, or put its folder on PYTHONPATH, here and on every worker",
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        raise BadInput(
            f"{key}: {name} can't be imported: {module_name} has no {function_name}",
            "correct the name of the function",
        )
    if not _takes_arguments(function):
        raise BadInput(
            f"{key}: {name} can't be called with {', '.join(ARGUMENTS)}",
            f"define it as def {function_name}({', '.join(ARGUMENTS)}) and return a number",
        )
    return function  # type: ignore[no-any-return]


def _takes_arguments(function: Any) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*ARGUMENTS)
    except (TypeError, ValueError):  # ValueError: some builtins have no signature
        return False
    return True


def custom_value(name: str, predictions: Any, references: Any, scores: Any) -> float:
    """Call a metric of the user's own.

    Raises MetricFailed if it raises an error or returns something that is no finite number.
    """
    function = custom_function(name)
    hint = f"correct {name}: it takes {', '.join(ARGUMENTS)} and returns a finite number"
    try:
        returned = function(predictions, references, scores)
        value = float(returned)
    except Exception as error:  # the user's function may raise anything
        raise MetricFailed(
            f"the metric {name} failed: {type(error).__name__}: {error}", hint
        ) from error
    if not math.isfinite(value):
        raise MetricFailed(f"the metric {name} returned {value:g}", hint)
    return value
