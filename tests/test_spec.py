"""The job spec's models: strict types, checks across keys, and the editors' JSON schema."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped,unused-ignore]
import pytest
from pydantic import ValidationError

from orchestrator.job.spec import (
    BASELINES,
    PROMPT_METHODS,
    SPACES,
    Conflict,
    DataSpec,
    JobSpec,
    LogUniform,
    MethodName,
    RegistrySpec,
    SearchSpec,
    SpaceSpec,
    TextInit,
    TrainSpec,
    Uniform,
    job_schema,
    template_columns,
)
from orchestrator.job.spec.methods import REPARAMETERIZATIONS


def job(**sections: Any) -> dict[str, Any]:
    """Return the smallest valid job, with ``sections`` replacing its own."""
    smallest: dict[str, Any] = {
        "name": "sms-spam",
        "base_model": {"id": "builtin:quickstart"},
        "data": {
            "path": "a.jsonl",
            "template": "{text}",
            "target": "label",
            "verbalizer": {0: " ham", 1: " spam"},
        },
    }
    return smallest | sections


def full_job() -> dict[str, Any]:
    """Return a job with values for most keys, including ranges and texts."""
    return job(
        data={
            "path": {"train": "a.jsonl", "test": "c.parquet"},
            "rename": {"sms": "text"},
            "template": "{text}\nSpam or not? {{}}",
            "target": "label",
            "verbalizer": {0: " ham", 1: " spam"},
            "limit": {"train": 100},
        },
        search={
            "space": {
                "init": ["random", "class_labels", {"text": "Classify the message."}],
                "num_virtual_tokens": [5, 20],
                "learning_rate": {"loguniform": [0.003, 0.5]},
                "seed": [0, 1],
            },
            "trials": 32,
            "stop": {"metric": 0.98, "minutes": 5},
        },
        resources={"workers": 2, "gpus_per_worker": 0.5},
        registry={"model": "sms", "alias": "challenger"},
    )


def conflicts(sections: dict[str, Any]) -> list[str]:
    """Return the keys of a job's conflicts."""
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(job(**sections))
    found: list[Conflict] = [
        conflict
        for detail in caught.value.errors()
        for conflict in detail.get("ctx", {}).get("conflicts", ())
    ]
    return [conflict.where for conflict in found]


DATA_WITHOUT_VERBALIZER = {"path": "a.jsonl", "template": "{text}", "target": "label"}


def test_the_smallest_job_has_a_default_for_everything_else() -> None:
    """Three sections suffice; the registered model takes the search's name."""
    spec = JobSpec.model_validate(job())
    assert (spec.train.steps, spec.search.metric, spec.model_name) == (500, "accuracy", "sms-spam")


def test_a_dumped_spec_loads_as_the_same_spec() -> None:
    """model_dump and model_validate are inverse, ranges, texts and label types included."""
    spec = JobSpec.model_validate(full_job())
    assert JobSpec.model_validate(spec.model_dump()) == spec


@pytest.mark.parametrize("value", ["5", True, 5.0, None])
def test_an_integer_is_only_an_integer(value: Any) -> None:
    """Text, truth values and floats are not taken for whole numbers."""
    with pytest.raises(ValidationError):
        SpaceSpec.model_validate({"num_virtual_tokens": value})


@pytest.mark.parametrize("value", ["0.1", True, float("nan"), float("inf"), 0, -1])
def test_a_learning_rate_is_a_finite_number_above_zero(value: Any) -> None:
    """Text, truth values, infinities and everything not above zero are refused."""
    with pytest.raises(ValidationError):
        SpaceSpec.model_validate({"learning_rate": value})


@pytest.mark.parametrize(
    "written", ["{0}", "[0.1, {0}]", '{{"loguniform": [0.1, {0}]}}', '{{"uniform": [0.1, {0}]}}']
)
def test_a_learning_rate_is_at_most_a_thousand(written: str) -> None:
    """The bound holds alone, in a list and in a range; above it, arithmetic may overflow."""
    SpaceSpec.model_validate({"learning_rate": json.loads(written.format("1000"))})
    with pytest.raises(ValidationError):
        SpaceSpec.model_validate({"learning_rate": json.loads(written.format("1000.001"))})


def test_a_whole_number_is_a_good_learning_rate() -> None:
    """Strict floats still take whole numbers, which YAML writes without a point."""
    assert SpaceSpec.model_validate({"learning_rate": [1, 0.1]}).learning_rate == [1.0, 0.1]


def test_labels_keep_their_type() -> None:
    """The verbalizer's keys stay numbers, truth values or text: rows are looked up by them."""
    data = DATA_WITHOUT_VERBALIZER | {"verbalizer": {0: " a", "1": " b", True: " c"}}
    labels = list(JobSpec.model_validate(job(data=data)).data.verbalizer or {})
    assert [type(label) for label in labels] == [int, str, bool]


@pytest.mark.parametrize("section", [LogUniform, Uniform])
def test_a_range_is_ordered(section: type[LogUniform] | type[Uniform]) -> None:
    """A range whose bounds are equal or reversed is refused."""
    name = next(iter(section.model_fields))
    for bounds in ([0.5, 0.003], [0.5, 0.5]):
        with pytest.raises(ValidationError, match="smaller bound first"):
            section.model_validate({name: bounds})


def test_a_list_names_each_value_once() -> None:
    """Repeats in a list are refused, as they would repeat trials and weigh a value twice."""
    for space in (
        {"seed": [0, 1, 0]},
        {"init": [TextInit(text="a"), TextInit(text="a")]},
        {"learning_rate": [1, 1.0]},
    ):
        with pytest.raises(ValidationError, match="twice"):
            SpaceSpec.model_validate(space)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V20"])
def test_aliases_that_mlflow_reserves_are_refused(alias: str) -> None:
    """latest and v1, v2, ... can't be aliases."""
    with pytest.raises(ValidationError, match="reserved by MLflow"):
        RegistrySpec(alias=alias)


@pytest.mark.parametrize("alias", ["a.b", "v1.2", "-a", "_a", "a b", "ä", "", "a" * 101])
def test_aliases_that_mlflow_does_not_take_are_refused(alias: str) -> None:
    """Aliases have letters, digits, - and _; a dot is only valid in a model's name."""
    with pytest.raises(ValidationError, match="should match pattern"):
        RegistrySpec(alias=alias)
    assert RegistrySpec(alias="A-b_3", model="a.b").alias == "A-b_3"


@pytest.mark.parametrize(
    "template", ["no column", "{{text}}", "a { b {text}", "{text} }", "{text} {}"]
)
def test_a_template_names_columns_and_has_no_lone_brace(template: str) -> None:
    """A template without a column, with a brace too many or an empty name is refused."""
    with pytest.raises(ValidationError):
        JobSpec.model_validate(
            job(data=DATA_WITHOUT_VERBALIZER | {"template": template, "verbalizer": {0: "a"}})
        )


def test_template_columns_reads_doubled_braces_as_text() -> None:
    """Columns come in order of appearance; {{ and }} are literal braces."""
    assert template_columns("{{a}} {b} {c d}{{{e}}}") == ["b", "c d", "e"]


def test_accuracy_and_class_labels_need_a_verbalizer() -> None:
    """Both conflicts are found at once, each at the key that the user wrote."""
    chosen = {"metric": "accuracy", "space": {"init": ["random", "class_labels"]}}
    assert conflicts({"data": DATA_WITHOUT_VERBALIZER, "search": chosen}) == [
        "search.metric",
        "search.space.init",
    ]
    assert conflicts({"data": DATA_WITHOUT_VERBALIZER}) == ["data.verbalizer"]


def test_a_job_that_generates_needs_no_verbalizer() -> None:
    """exact_match, loss and the text metrics need no labels; only loss is better if smaller."""
    for metric in ("exact_match", "loss", "bleu", "rouge_l", "f1"):
        spec = JobSpec.model_validate(job(data=DATA_WITHOUT_VERBALIZER, search={"metric": metric}))
        assert spec.search.better == ("min" if metric == "loss" else "max")
        assert spec.generates == (metric in {"bleu", "rouge_l", "f1"})


@pytest.mark.parametrize("metric", ["bleu", "rouge_l", "f1"])
def test_a_text_metric_needs_a_target_that_is_text(metric: str) -> None:
    """With a verbalizer the target is a label.

    Text metrics and references conflict with it, each at its own key.
    """
    assert conflicts({"search": {"metric": metric}}) == ["search.metric"]
    data = job()["data"] | {"references": "texts"}
    assert conflicts({"data": data, "search": {"metric": metric}}) == [
        "search.metric",
        "data.references",
    ]
    assert conflicts({"data": data}) == ["data.references"]
    JobSpec.model_validate(
        job(data=DATA_WITHOUT_VERBALIZER | {"references": "texts"}, search={"metric": metric})
    )


def test_a_text_metric_lies_between_0_and_1() -> None:
    """A BLEU target of 40 uses sacreBLEU's own scale and is refused."""
    stop = {"metric": "bleu", "stop": {"metric": 40}}
    assert conflicts({"data": DATA_WITHOUT_VERBALIZER, "search": stop}) == ["stop.metric"]


def test_generation_is_greedy_and_as_long_as_a_target_may_be() -> None:
    """Generation has these defaults, and takes explicit values."""
    data = DATA_WITHOUT_VERBALIZER | {"max_target_tokens": 33}
    spec = JobSpec.model_validate(job(data=data, search={"metric": "f1"}))
    assert (spec.max_generated_tokens, spec.generation.num_beams) == (33, 1)
    generation = {"max_tokens": 7, "num_beams": 5}
    spec = JobSpec.model_validate(job(data=data, search={"metric": "f1"}, generation=generation))
    assert (spec.max_generated_tokens, spec.generation.num_beams) == (7, 5)


@pytest.mark.parametrize(
    "generation", [{"max_tokens": 0}, {"num_beams": 0}, {"num_beams": 65}, {"beams": 2}]
)
def test_generation_out_of_range_is_refused(generation: dict[str, int]) -> None:
    """Zero tokens, zero beams and more beams than could ever fit are refused."""
    with pytest.raises(ValidationError):
        JobSpec.model_validate(job(generation=generation))


def test_mode_can_only_be_what_the_metric_means() -> None:
    """mode min with accuracy, or max with loss, would choose the worst trial."""
    assert conflicts({"search": {"mode": "min"}}) == ["mode"]
    assert conflicts({"search": {"metric": "loss", "mode": "max"}}) == ["mode"]
    assert SearchSpec(metric="loss", mode="min").better == "min"


def test_a_grid_needs_listed_values() -> None:
    """searcher grid is refused with a range of learning rates."""
    space = {"learning_rate": {"uniform": [0.1, 0.2]}}
    assert conflicts({"search": {"searcher": "grid", "space": space}}) == ["searcher"]


def test_a_target_out_of_the_metrics_reach_is_refused() -> None:
    """An accuracy of 98 is a percentage by mistake; a loss has no upper bound."""
    assert conflicts({"search": {"stop": {"metric": 98}}}) == ["stop.metric"]
    SearchSpec.model_validate({"metric": "loss", "stop": {"metric": 98}})


PBT = {"scheduler": "pbt", "space": {"learning_rate": [0.1, 0.2]}}


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"search": {"perturbation_steps": 50}}, ["perturbation_steps"]),
        ({"search": PBT | {"trials": 1}}, ["scheduler"]),
        ({"search": {"scheduler": "pbt"}}, ["scheduler"]),
        (
            {"search": PBT | {"space": {"learning_rate": [0.1]}, "trials": 1}},
            ["scheduler", "scheduler"],
        ),
        ({"search": PBT | {"perturbation_steps": 75}}, ["search.perturbation_steps"]),
        ({"search": PBT | {"perturbation_steps": 500}}, ["search.perturbation_steps"]),
        ({"search": PBT, "train": {"steps": 50}}, ["train.evaluate_every"]),
        (
            {"search": PBT, "resources": {"workers": 1, "trials_per_worker": 1}},
            ["search.scheduler"],
        ),
    ],
)
def test_a_population_that_could_not_change_is_refused(
    sections: dict[str, Any], where: list[str]
) -> None:
    """A population needs several trials at once, several learning rates, and early comparisons.

    There must be an evaluation before the end at which trials are compared.
    """
    assert conflicts(sections) == where


def test_a_population_is_compared_at_evaluations() -> None:
    """A population is compared at each evaluation by default."""
    assert JobSpec.model_validate(job(search=PBT)).perturbation_steps == 50
    assert (
        JobSpec.model_validate(job(search=PBT | {"perturbation_steps": 150})).perturbation_steps
        == 150
    )
    ranged = {"scheduler": "pbt", "space": {"learning_rate": {"loguniform": [0.1, 0.2]}}}
    JobSpec.model_validate(job(search=ranged, resources={"workers": 2, "trials_per_worker": 1}))


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"resources": {"sharding": "fsdp"}}, ["sharding"]),
        ({"resources": {"workers_per_group": 2, "gpus_per_worker": 0.5}}, ["gpus_per_worker"]),
        ({"resources": {"gpus_per_worker": 2}}, ["gpus_per_worker"]),
        (
            {
                "resources": {"sharding": "fsdp", "workers_per_group": 2},
                "base_model": {"id": "m", "quantization": "int4"},
            },
            ["resources.sharding"],
        ),
    ],
)
def test_groups_that_could_not_work_are_refused(sections: dict[str, Any], where: list[str]) -> None:
    """Groups that can't share their weights or GPUs are refused.

    The cases are sharding with a single worker, several workers of a group on one GPU, several GPUs
    for one worker, and weights that can't be split.
    """
    assert conflicts(sections) == where


@pytest.mark.parametrize(
    "resources", [{"workers_per_group": 0}, {"workers_per_group": "auto"}, {"sharding": "zero"}]
)
def test_groups_out_of_range_are_refused(resources: dict[str, Any]) -> None:
    """No workers, an undefined size and an unknown sharding are refused."""
    with pytest.raises(ValidationError):
        JobSpec.model_validate(job(resources=resources))


def test_every_trial_is_evaluated_at_least_once() -> None:
    """evaluate_every above steps is refused."""
    assert conflicts({"train": {"steps": 10, "evaluate_every": 20}}) == ["train.evaluate_every"]


@pytest.mark.parametrize(
    ("train", "where"),
    [
        ({"steps": 60, "warmup_steps": 60}, ["warmup_steps"]),
        ({"batch_size": 4, "micro_batch_size": 5}, ["micro_batch_size"]),
        ({"momentum": 0.9}, ["momentum"]),
        ({"optimizer": "adafactor", "momentum": 0.0}, ["momentum"]),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, ["betas"]),
        ({"decay_rate": 0.9}, ["decay_rate"]),
        (
            {"schedule": "cosine", "decay_rate": 0.9, "decay_steps": 5},
            ["decay_rate", "decay_steps"],
        ),
        ({"schedule": "exponential"}, ["schedule", "schedule"]),
        ({"schedule": "exponential", "decay_rate": 0.9}, ["schedule"]),
    ],
)
def test_train_settings_that_would_do_nothing_are_refused(
    train: dict[str, Any], where: list[str]
) -> None:
    """Each problem is at its key.

    Refused are keys of another optimiser or schedule, missing keys, and sizes beyond steps or rows.
    """
    assert conflicts({"train": train}) == where


@pytest.mark.parametrize(
    "train",
    [
        {"steps": 60, "warmup_steps": 59},
        {"batch_size": 4, "micro_batch_size": 4},
        {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 1, "loss_reduction": "sum_per_row"},
        {"optimizer": "adamw", "betas": [0, 0.999], "frozen_dropout": True},
        {"schedule": "exponential", "decay_rate": 0.98, "decay_steps": 10, "warmup_steps": 5},
    ],
)
def test_train_settings_that_fit_are_kept_through_a_dump(train: dict[str, Any]) -> None:
    """Each optimiser and schedule takes its own keys, in the schema too.

    A dumped section loads as the same.
    """
    spec = JobSpec.model_validate(job(train=train))
    jsonschema.validate(as_json(job(train=train)), job_schema(), jsonschema.Draft202012Validator)
    assert TrainSpec.model_validate(spec.train.model_dump()) == spec.train
    assert spec.train.model_dump(include=set(train)) == train | (
        {"betas": (0, 0.999)} if "betas" in train else {}
    )


@pytest.mark.parametrize(
    "train",
    [
        {"betas": [0.9]},
        {"betas": [0.9, 0.99, 0.999]},
        {"betas": [0.9, 1.0]},
        {"momentum": 1.0, "optimizer": "sgd"},
        {"clip_norm": 0},
        {"warmup_steps": -1},
        {"micro_batch_size": 0},
        {"schedule": "exponential", "decay_rate": 1.0, "decay_steps": 1},
        {"schedule": "exponential", "decay_rate": 0.5, "decay_steps": 0},
        {"loss_reduction": "mean"},
        {"frozen_dropout": 0.1},
    ],
)
def test_train_settings_out_of_range_are_refused(train: dict[str, Any]) -> None:
    """Decays are in [0, 1) and counts are positive, in the schema as well."""
    with pytest.raises(ValidationError):
        TrainSpec.model_validate(train)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            as_json(job(train=train)), job_schema(), jsonschema.Draft202012Validator
        )


# -- JSON schema


def as_json(value: Any) -> Any:
    """Return a job as an editor sees it: JSON keys are always text."""
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list) else value


def test_the_schema_is_valid_and_titled() -> None:
    """The schema itself is a valid JSON schema of draft 2020-12."""
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["title"] == "prompt-orchestrator job spec"


def choices(value: dict[str, Any]) -> set[str]:
    """Return the words that a key allows; auto and none explain themselves."""
    branches = [*value.get("anyOf", ()), value.get("items", {})]
    inner = {word for branch in branches if branch for word in choices(branch)}
    own = {value["const"]} if "const" in value else {*value.get("enum", ())}
    return {str(word) for word in inner | own} - {"auto", "none"}


def test_the_schema_explains_every_choice() -> None:
    """The description of a key with choices names each of them: ``help`` for inits, methods, ..."""
    schema = job_schema()
    unnamed = [
        f"{key}: {word}"
        for section in [schema, *schema["$defs"].values()]
        for key, value in section["properties"].items()
        for word in choices(value)
        if not re.search(rf"\b{re.escape(word)}\b", value.get("description", ""))
    ]
    assert len(choices(schema["properties"]["method"])) > 5
    assert not unnamed


def test_every_method_has_a_space() -> None:
    """SPACES has an entry for each method, and each method is a prompt's or a baseline."""
    assert {*SPACES} == {*get_args(MethodName)} == {*PROMPT_METHODS, *BASELINES}
    assert {*PROMPT_METHODS}.isdisjoint(BASELINES)
    assert {*REPARAMETERIZATIONS} <= {*PROMPT_METHODS}


def test_the_schema_describes_every_key_and_closes_every_section() -> None:
    """Keys have descriptions, optional keys have defaults, and unknown keys fail everywhere."""
    schema = job_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert section["description"]
        for key, value in section["properties"].items():
            # A key that shares its section's description has it there.
            section_of = schema["$defs"].get(value.get("$ref", "").rsplit("/", 1)[-1], {})
            assert value.get("description") or section_of.get("description"), key
            assert key in section.get("required", ()) or "default" in value, key


@pytest.mark.parametrize("good", [job(), full_job()])
def test_the_schema_accepts_good_jobs(good: dict[str, Any]) -> None:
    """The schema accepts what the models accept."""
    jsonschema.validate(as_json(good), job_schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "bad",
    [
        job(nmae="x"),
        job(name="has spaces"),
        job(train={"steps": 0}),
        job(train={"steps": "5"}),
        job(generation={"num_beams": 0}),
        job(search={"metric": "rouge"}),
        job(search={"space": {"seed": [1, 1]}}),
        job(search={"space": {"learning_rate": {"loguniform": [0.1]}}}),
        job(search={"space": {"learning_rate": 1001}}),
        job(search={"space": {"learning_rate": {"uniform": [0.1, 1001]}}}),
        job(registry={"alias": "a.b"}),
        {"name": "x"},
    ],
)
def test_the_schema_refuses_what_the_models_refuse(bad: dict[str, Any]) -> None:
    """Editors already flag these errors.

    They are unknown keys, wrong types, values out of range, repeats and missing keys.
    """
    with pytest.raises(ValidationError):
        JobSpec.model_validate(bad)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(as_json(bad), job_schema(), jsonschema.Draft202012Validator)


def test_the_answer_in_the_input_is_a_conflict() -> None:
    """A template that contains the target or the references makes results meaningless."""
    data = job()["data"]
    assert conflicts({"data": {**data, "template": "{label} {text}"}}) == ["template"]
    texts = {"path": "x", "template": "{text} {right}", "target": "answer", "references": "right"}
    assert conflicts({"data": texts, "search": {"metric": "bleu"}}) == ["template"]
    pieces = {
        "path": "x",
        "prefix_lm": "text",
        "template": "{prefix}{continuation}",
        "target": "continuation",
    }
    assert conflicts({"data": pieces, "search": {"metric": "loss"}}) == ["template"]
    wordings = {"space": {"template": ["{text}", "{text} {label}"]}}
    assert conflicts({"method": "prompt_design", "search": wordings}) == ["search.space.template"]
    for template in ("{{label}} {text}", "label {text}", "{label_of} {text}"):
        assert JobSpec.model_validate(job(data={**data, "template": template}))


@pytest.mark.parametrize(
    ("rename", "template", "where"),
    [
        ({"label": "kind"}, "{kind} {text}", ["template"]),
        ({"kind": "label"}, "{kind} {text}", ["template"]),
        ({"label": "text", "text": "label"}, "{text}", []),
        ({"sms": "text"}, "{text}", []),
    ],
)
def test_the_answer_in_the_input_by_another_name(
    rename: dict[str, str], template: str, where: list[str]
) -> None:
    """A renamed column is still the same column; two that swap names are different ones."""
    data = {**job()["data"], "rename": rename, "template": template}
    assert [conflict.where for conflict in DataSpec.model_construct(**data)._conflicts()] == where


def test_a_way_to_hold_out_rows_needs_rows_to_hold_out() -> None:
    """With files for validation and test no rows are held out."""
    path = {"train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"}
    data = {**job()["data"], "held_out": "random"}
    assert conflicts({"data": {**data, "path": path}}) == ["held_out"]
    assert JobSpec.model_validate(
        job(data={**data, "path": {"train": "a.jsonl", "test": "c.jsonl"}})
    )
