"""Random jobs and text are refused exactly when the models refuse, in our own words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_texts import GOOD, Files
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.job.spec import JobSpec

FULL: dict[str, Any] = {
    "name": "x",
    "base_model": {"id": "x", "revision": "main", "dtype": "auto"},
    "data": {
        "path": {"train": "a.jsonl", "test": "b"},
        "rename": {"a": "text"},
        "template": "{text}",
        "target": "y",
        "verbalizer": {0: "a", True: "b", "c": "d"},
        "validation_fraction": 0.2,
        "limit": {"train": 5},
    },
    "search": {
        "space": {
            "init": ["random", {"text": "a"}],
            "num_virtual_tokens": [5, 20],
            "learning_rate": {"loguniform": [0.1, 1]},
            "seed": 0,
        },
        "trials": 4,
        "searcher": "random",
        "metric": "accuracy",
        "mode": "max",
        "stop": {"metric": 0.5, "minutes": 3},
    },
    "train": {"steps": 100, "evaluate_every": 10, "weight_decay": 0.0},
    "generation": {"num_beams": 1},
    "resources": {"workers": "auto", "gpus_per_worker": 0.5},
    "registry": {"model": "m", "alias": "challenger"},
}

numbers = st.sampled_from([0, 1, -1, 5, 10**12, 0.5, 1.5, -0.0, math.inf, math.nan])
words = st.sampled_from(
    [
        "",
        "5",
        "auto",
        "random",
        "class_labels",
        "latest",
        "min",
        "grid",
        "exact_match",
        "loss",
        "bleu",
    ]
)
oddities = st.sampled_from([None, True, False, "x y", "{a}", "{", "\x00", "\ud800"])
atoms = numbers | words | oddities
keys = st.sampled_from(
    ["init", "text", "loguniform", "steps", "x", "train", "", "a.b", 0, 1, True, "verbalizer"]
)
values = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """Draw a copy of FULL with a few values replaced, removed or added anywhere."""

    def change(value: Any, depth: int) -> Any:
        if depth == 0 or not isinstance(value, dict | list) or not value:
            return draw(values)
        if isinstance(value, list):
            index = draw(st.integers(0, len(value) - 1))
            return [change(item, depth - 1) if i == index else item for i, item in enumerate(value)]
        key = draw(st.sampled_from(list(value)))
        match draw(st.sampled_from(["change", "change", "change", "remove", "add"])):
            case "remove":
                return {name: inner for name, inner in value.items() if name != key}
            case "add":
                return value | {draw(keys): draw(values)}
        return value | {key: change(value[key], depth - 1)}

    job: Any = FULL
    for _ in range(draw(st.integers(0, 4))):
        job = change(job, draw(st.integers(1, 5)))
    return job


def accepted(job: Any) -> bool:
    """Return whether the models accept the job."""
    try:
        JobSpec.model_validate(job)
        return True
    except ValidationError:
        return False


@given(job=mutated())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_file_loads_exactly_when_the_models_accept_it(files: Files, job: Any) -> None:
    """Every refusal of the models is explained in our own words; nothing else is refused."""
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=False, default_flow_style=None)
    if accepted(job):
        assert files.load(text) == JobSpec.model_validate(job)
        return
    for problem in files.problems(text):
        str(problem).encode()  # printable, whatever the file holds
        assert "Input should" not in problem.message  # pydantic's wording, a last resort
        assert problem.file == str(files.path)


@given(text=st.text(max_size=200))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_loads_or_gives_problems(files: Files, text: str) -> None:
    """Any file and any override is loaded or raises SpecError."""
    with pytest.raises(SpecError):
        files.load(text.encode("utf-8", "surrogatepass"))
    try:
        files.load(GOOD, [text, f"data.target={text}"])
    except SpecError as error:
        str(error).encode()
