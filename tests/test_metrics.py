"""Every place that lists or compares metrics derives from one list, or is checked against it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_jobs import Command, write_job
from test_spec import DATA_WITHOUT_VERBALIZER, conflicts, job

from orchestrator.errors import BadInput
from orchestrator.job.metrics import METRICS, Metric, metric_named, names_of, preferred
from orchestrator.job.spec import JobSpec, SearchSpec, job_schema

each = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def with_metric(metric: Metric, **search: Any) -> dict[str, Any]:
    """Return a job that ranks by a metric, on data of the kind that the metric needs."""
    labels = {} if metric.kind != "texts" else {"data": DATA_WITHOUT_VERBALIZER}
    return job(search={"metric": metric.name, **search}, **labels)


@each
def test_a_search_ranks_by_every_metric_in_its_direction(metric: Metric) -> None:
    """The spec takes each metric and its direction, and refuses the other one."""
    spec = JobSpec.model_validate(with_metric(metric))
    assert spec.search.better == metric.better
    assert spec.generates == (metric.kind == "texts")
    other = "min" if metric.better == "max" else "max"
    with pytest.raises(ValidationError, match="would look for the worst"):
        JobSpec.model_validate(with_metric(metric, mode=other))


@each
def test_a_target_lies_in_the_metrics_range(metric: Metric) -> None:
    """A target at either end is taken; one below it, or above it, is refused."""
    for value in (metric.lowest, min(metric.highest, 100.0)):
        JobSpec.model_validate(with_metric(metric, stop={"metric": value}))
    for value in (metric.lowest - 0.1, metric.highest + 0.1):
        if math.isfinite(value):
            with pytest.raises(ValidationError, match=f"is no {metric.name}: it"):
                JobSpec.model_validate(with_metric(metric, stop={"metric": value}))


@pytest.mark.parametrize("name", names_of("labels"))
def test_metrics_of_labels_need_a_verbalizer(name: str) -> None:
    """Without labels there is nothing to judge, and the message lists the metrics there are."""
    document = job(data=DATA_WITHOUT_VERBALIZER, search={"metric": name})
    assert conflicts({"data": DATA_WITHOUT_VERBALIZER, "search": {"metric": name}}) == [
        "search.metric"
    ]
    with pytest.raises(ValidationError, match=f"{name} ranks labels and needs data.verbalizer"):
        JobSpec.model_validate(document)


def test_a_function_judges_labels_or_texts() -> None:
    """A function of the user's own goes with any data, in either direction, without a range."""
    name = "package.module:function"
    search = {"metric": name, "mode": "min", "stop": {"metric": -300.0}}
    spec = JobSpec.model_validate(job(search=search))
    assert spec.search.better == "min" and not spec.generates
    texts = job(data=DATA_WITHOUT_VERBALIZER, search={"metric": name})
    spec = JobSpec.model_validate(texts)
    assert spec.search.better == "max" and spec.generates


@pytest.mark.parametrize("name", ["zzz", "module:", ":function", "a b:c", "1a:b", "a:b:c", "a:b.c"])
def test_no_other_name_is_a_metric(name: str) -> None:
    """A name is one of the list, or a module and a function."""
    with pytest.raises(ValidationError):
        SearchSpec(metric=name)


def test_the_schema_lists_every_metric() -> None:
    """Editors offer the list's metrics, and accept a function's name."""
    search = job_schema()["$defs"]["SearchSpec"]["properties"]["metric"]
    words, function = search["anyOf"]
    assert words["enum"] == names_of() and re.match(function["pattern"], "module:function")
    described = set(re.findall(r"\w+", search["description"]))
    assert set(names_of()) <= described


def test_the_documents_table_is_the_list() -> None:
    """docs/metrics.md has a row for each metric, with its kind, direction, range and meaning."""
    rows = [
        f"| `{it.name}` | {it.kind} | {it.better} | "
        + (f"from {it.lowest:g}" if math.isinf(it.highest) else f"{it.lowest:g} to {it.highest:g}")
        + f" | {it.meaning} |"
        for it in METRICS
    ]
    assert (
        re.findall(r"^\| `.*", DOCS.read_text(encoding="utf-8"), re.MULTILINE)[: len(rows)] == rows
    )


def test_tables_prefer_metrics_in_the_order_of_the_list() -> None:
    """Accuracy comes before the loss, which every evaluation has; unknown names do not count."""
    assert preferred(["loss", "accuracy"]) == "accuracy"
    assert preferred(["rouge_1", "f1", "exact_match"]) == "f1"
    assert preferred(["rouge_1"]) is None
    with pytest.raises(BadInput, match="zzz"):
        metric_named("zzz")


WEIGHTS: dict[str, tuple[Any, str]] = {
    "unknown label": ({"2": 3.0}, '"2" is no label of data.verbalizer'),
    "the same label twice": ({0: 2.0, "0": 3.0}, "two labels mean the same"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_class_weights_are_those_of_labels(case: str) -> None:
    """A weight of a label that there is not, and two weights of one label, are refused."""
    weights, reason = WEIGHTS[case]
    with pytest.raises(ValidationError, match=reason):
        JobSpec.model_validate(job(train={"class_weights": weights}))
    JobSpec.model_validate(job(train={"class_weights": {0: 2.0, "1": 3.0}}))
    JobSpec.model_validate(job(train={"class_weights": "balanced"}))


@pytest.mark.parametrize("weights", ["equal", {}, {0: 0.0}, {0: -1.0}, {0: math.inf}, 3.0])
def test_class_weights_are_positive_numbers(weights: Any) -> None:
    """Zero, negative and infinite weights, and other words than balanced, are refused."""
    with pytest.raises(ValidationError):
        JobSpec.model_validate(job(train={"class_weights": weights}))


def test_class_weights_need_labels() -> None:
    """A job without a verbalizer has no classes to weight."""
    search = {"metric": "loss"}
    changes = {"data": DATA_WITHOUT_VERBALIZER, "search": search}
    assert conflicts(changes | {"train": {"class_weights": "balanced"}}) == ["train.class_weights"]


def test_a_function_that_can_not_be_used_is_a_problem_with_its_line(
    command: Command, tmp_path: Path
) -> None:
    """``validate`` imports the function, and names the line of the metric."""
    job_file = write_job(tmp_path, search__metric="own_metrics:share_of_right")
    assert command("validate", job_file).code == 0
    for name, reason in (
        ("own_metrics:too_few", "can't be called with predictions, references, scores"),
        ("no_such_module_anywhere:f", "can't be imported"),
    ):
        job_file = write_job(tmp_path, search__metric=name)
        line = 1 + job_file.read_text().splitlines().index(f"  metric: {name}")
        said = command("validate", job_file)
        assert said.code == 2 and f":{line}: search.metric: {name} {reason}" in said.err


def test_an_area_without_a_value_is_refused_with_the_split(
    command: Command, tmp_path: Path
) -> None:
    """roc_auc needs rows of every label in validation and test; macro_f1 does not."""
    job_file = write_job(tmp_path, search__metric="roc_auc")
    assert command("validate", job_file).code == 0
    test = tmp_path / "test.jsonl"
    lines = test.read_text().splitlines()
    test.write_text("".join(f"{line}\n" for line in lines if '"label": 1' in line))
    said = command("validate", job_file)
    assert said.code == 2
    assert "search.metric roc_auc has no value on test, which has no row of class '0'" in said.err
    assert command("validate", job_file, "--set", "search.metric=macro_f1").code == 0
