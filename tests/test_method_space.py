"""A search space of several methods: validation, draws, grids, proposals, and trials as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import BadInput, SpecError
from orchestrator.job.space import (
    TrialSpec,
    confirming_total,
    fresh_seeds,
    grid_size,
    longest,
    shares,
    trial_count,
    trials,
)
from orchestrator.job.spec import SPACES, JobSpec, SearchSpec, job_schema
from orchestrator.job.yaml import load_job
from orchestrator.search.study.tpe import Proposer

RATE = {"loguniform": [0.0001, 0.01]}
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": [5, 20], "learning_rate": [0.1, 0.3]},
    "prefix_tuning": {"num_virtual_tokens": 5, "learning_rate": [0.01]},
    "lora": {"rank": [2, 8], "learning_rate": [0.001, 0.003]},
}


def document(
    methods: dict[str, Any] = METHODS,
    shared: dict[str, Any] | None = None,
    *,
    search: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a job that mixes methods; ``shared`` are the dimensions beside them."""
    shared = {"seed": [0, 1]} if shared is None else shared
    return {
        "name": "x",
        "base_model": {"id": "m"},
        "data": {
            "path": "p",
            "template": "{text}",
            "target": "label",
            "verbalizer": {0: " a", 1: " b"},
        },
        "search": {"space": {**shared, "method": methods}, **(search or {})},
        **changes,
    }


def single(method: str, space: dict[str, Any], **search: Any) -> SearchSpec:
    """Return the search of one method alone."""
    job = {**document(), "method": method, "search": {"space": space, **search}}
    return JobSpec.model_validate(job).search


def mixed(methods: dict[str, Any] = METHODS, **search: Any) -> SearchSpec:
    return JobSpec.model_validate(document(methods, search=search)).search


def of(method: str, specs: list[TrialSpec]) -> list[TrialSpec]:
    """Return a method's trials as a search of it alone has them."""
    return [replace(spec, method="") for spec in specs if spec.method == method]


def problems(tmp_path: Path, job: dict[str, Any]) -> list[str]:
    """Return the problems that ``validate`` finds in the job: each one's key and text."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    with pytest.raises(SpecError) as refused:
        load_job(file)
    return [f"{problem.where}: {problem.message}" for problem in refused.value.problems]


def test_a_job_of_several_methods_is_loaded_saved_and_loaded_again(tmp_path: Path) -> None:
    """A job loads the same from its file and from the copy in the search's folder."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(document(), sort_keys=False))
    job = load_job(file)
    file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True), sort_keys=False))
    assert load_job(file) == job == JobSpec.model_validate(job.model_dump())
    assert job.methods == tuple(METHODS) and job.mixes and not job.is_baseline
    assert trials(load_job(file).search) == trials(job.search)
    assert longest(job.search.space) == 20


@pytest.mark.parametrize("method", METHODS)
def test_the_space_of_each_method_is_that_of_its_own_search(method: str) -> None:
    """Shared dimensions, own dimensions and defaults give the space that the method alone has."""
    alone = single(method, {**METHODS[method], "seed": [0, 1]}).space
    assert mixed().space.parts[method].model_dump() == alone.model_dump()


def test_a_dimension_of_a_method_goes_before_the_shared_one() -> None:
    """A method's own seed is used instead of the seed beside the methods."""
    methods = {**METHODS, "lora": {**METHODS["lora"], "seed": 7}}
    parts = mixed(methods).space.parts
    assert parts["lora"].seed == 7 and parts["prompt_tuning"].seed == [0, 1]


@pytest.mark.parametrize("searcher", ["random", "grid"])
@pytest.mark.parametrize("count", [7, 12])
def test_the_trials_of_each_method_are_those_of_its_own_search(searcher: str, count: int) -> None:
    """With its share of the trials, a search of one method has the same ones in the same order."""
    search = mixed(trials=count, searcher=searcher, seed=3)
    made = trials(search)
    assert len(made) == len(set(made)) == trial_count(search) == count
    assert {spec.method for spec in made[: len(METHODS)]} == set(METHODS)
    for method, share in shares(search.space, count).items():
        space = {**METHODS[method], "seed": [0, 1]}
        alone = single(method, space, trials=share, searcher=searcher, seed=3)
        assert of(method, made) == trials(alone)


def test_trials_are_divided_evenly_and_a_small_space_leaves_its_rest_to_others() -> None:
    """The prefixes' space has two points, so prompts and LoRA share the rest."""
    search = mixed(trials=12)
    assert Counter(spec.method for spec in trials(search)) == {
        "prompt_tuning": 5, "prefix_tuning": 2, "lora": 5,
    }  # fmt: skip
    assert grid_size(search.space) == 8 + 2 + 8
    assert trial_count(mixed(trials=100)) == 18 == len(trials(mixed(searcher="grid")))


@pytest.mark.parametrize("spec", trials(mixed(trials=6)), ids=lambda spec: spec.label())
def test_a_trial_of_several_methods_survives_json_and_tells_its_method(spec: TrialSpec) -> None:
    """Its configuration has the method and the method's own keys, and is read back."""
    config = json.loads(json.dumps(spec.config()))
    assert TrialSpec.from_config(config) == spec
    assert set(config) == {"method", *SPACES[spec.method]}  # type: ignore[index]
    assert spec.label().startswith(f"{spec.method.replace('_', ' ')}: ")


def test_a_configuration_of_an_unknown_method_is_refused() -> None:
    config = trials(mixed())[0].config()
    with pytest.raises(BadInput, match="unknown method"):
        TrialSpec.from_config({**config, "method": "no such method"})
    with pytest.raises(BadInput, match="has no rank, alpha"):
        TrialSpec.from_config({**config, "method": "lora"})


def test_a_confirmation_counts_the_configurations_of_all_methods() -> None:
    """Configurations differ in more than the seed: 4 of prompts, 1 of prefixes and 4 of LoRA."""
    search = mixed(trials=18, confirm=18, confirm_seeds=2)
    assert confirming_total(search) == 2 * 9
    proposed = search.model_copy(update={"searcher": "optuna"})
    assert confirming_total(proposed) == 2 * 9
    seeds = fresh_seeds(search.model_copy(update={"confirm_seeds": 9}))
    assert not {0, 1} & set(seeds)


def score(spec: TrialSpec) -> float:
    """Prefer LoRA, and then a small rank."""
    return -10.0 if spec.method != "lora" else -float(spec.rank or 0)


def proposed(search: SearchSpec, started: dict[int, TrialSpec] | None = None) -> list[TrialSpec]:
    """Return all proposals, each with its result known before the next."""
    proposer = Proposer(search)
    specs = proposer.replay(started or {})
    for number, spec in enumerate(specs):
        proposer.learn(number, score(spec))
    while (spec := proposer.propose()) is not None:
        proposer.learn(len(specs), score(spec))
        specs.append(spec)
    return specs


def test_tpe_prefers_the_better_method_and_then_its_better_values() -> None:
    """After a spread of all methods, most proposals are of the better method, near its optimum."""
    methods = {
        "prompt_tuning": {"num_virtual_tokens": [5, 20], "learning_rate": RATE},
        "lora": {"rank": [2, 4, 8, 16], "learning_rate": RATE},
        "adapter": {"learning_rate": RATE},
    }
    found = proposed(mixed(methods, trials=30, searcher="optuna"))
    assert len(set(found)) == 30 and {spec.method for spec in found[:3]} == set(methods)
    late = found[-12:]
    assert sum(spec.method == "lora" for spec in late) >= 8
    assert sum(spec.rank in (2, 4) for spec in late) >= 6
    assert all(set(spec.config()) == {"method", *SPACES[spec.method]} for spec in found)  # type: ignore[index]


def test_tpe_over_several_methods_goes_on_as_it_would_have() -> None:
    """Proposals after a break are those of a search without it, and no point comes twice."""
    search = mixed(trials=18, searcher="optuna")
    whole = proposed(search)
    assert len(set(whole)) == 18
    assert proposed(search, dict(enumerate(whole[:11]))) == whole


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unlisted method": (
        document({**METHODS, "lorra": {"learning_rate": RATE}}),
        'search.space.method.lorra: "lorra" is not allowed; allowed: prompt_tuning, prefix_tuning, '
        "p_tuning, prompt_design, model_tuning, lomo, lora, qlora or adapter",
    ),
    "no method": (document({}), "search.space.method: {} is not allowed"),
    "a method beside them": (
        document(method="lora"),
        "method: search.space.method says which methods the search tries; leave method out",
    ),
    "a dimension of another method": (
        document({**METHODS, "lora": {**METHODS["lora"], "init": "random"}}),
        "search.space.method.lora.init: method lora has no init; leave it out, its space has rank, "
        "alpha, learning_rate, seed",
    ),
    "a bad value": (
        document({**METHODS, "lora": {**METHODS["lora"], "rank": 0}}),
        "search.space.method.lora.rank: 0 is not allowed",
    ),
    "an unknown key": (
        document({**METHODS, "lora": {**METHODS["lora"], "rang": 4}}),
        "search.space.method.lora.rang: unknown key",
    ),
    "a shared dimension of none": (
        document(shared={"bottleneck": 8}),
        "search.space.bottleneck: none of prompt_tuning, prefix_tuning, lora has bottleneck; "
        "leave it out",
    ),
    "no learning rate": (
        document({**METHODS, "adapter": {}}),
        "search.space.method.adapter.learning_rate: method adapter has no default",
    ),
    "a method inside a method": (
        document({"lora": {"learning_rate": RATE, "method": {"lora": {}}}}),
        "search.space.method.lora.method: unknown key",
    ),
    "pbt": (
        document(search={"scheduler": "pbt"}),
        "search.scheduler: pbt copies the prompts of better trials, and a prompt of one method "
        "does not fit another",
    ),
    "a grid over a range": (
        document({**METHODS, "lora": {"learning_rate": RATE}}, search={"searcher": "grid"}),
        "search.searcher: grid needs listed values and space.learning_rate is a range for lora",
    ),
    "fewer trials than methods": (
        document(search={"trials": 2}),
        "search.trials: 2 would leave out some of the 3 methods of space.method; raise it to at "
        "least 3",
    ),
    "a group of workers with a baseline": (
        document(resources={"workers_per_group": 2}),
        "resources.workers_per_group: method lora trains on one worker at a time",
    ),
    "virtual tokens in the template of a baseline": (
        document(data={**document()["data"], "template": "{*}{text}"}),
        "data.template: {*} places virtual tokens, and method lora has none",
    ),
    "qlora without rounding": (
        document({"qlora": {"learning_rate": RATE}, **METHODS}),
        "base_model.quantization: qlora is lora over rounded weights",
    ),
    "a network that a method lacks": (
        document(reparameterization={"type": "lstm"}),
        "reparameterization.type: lstm does not go with method prefix_tuning; use mlp or none",
    ),
    "a network that no method has": (
        document({"lora": METHODS["lora"], "adapter": METHODS["lora"] | {"rank": None}},
                 reparameterization={"type": "mlp"}),
        "reparameterization.type: mlp does not go with lora and adapter; use none",
    ),
    "labels of no verbalizer": (
        document({**METHODS, "p_tuning": {"init": ["random", "class_labels"]}},
                 data={"path": "p", "template": "{text}", "target": "label"},
                 search={"metric": "loss"}),
        "search.space.method.p_tuning.init: class_labels needs data.verbalizer",
    ),
    "a registered model of baselines": (
        document({"lora": METHODS["lora"], "adapter": {"learning_rate": RATE}},
                 registry={"model": "other"}),
        "registry.model: each of lora and adapter makes no prompt to register or serve",
    ),
    "demonstrations that are not written": (
        document({**METHODS, "prompt_design": {"shots": 0, "demonstrations": "nearest"}}),
        "search.space.method.prompt_design.demonstrations: "
        "search.space.method.prompt_design.demonstrations has no effect with search.space.shots 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_a_mixed_search_is_named(tmp_path: Path, name: str) -> None:
    """The problem is at its key; the spec models refuse the job too, without the command line."""
    job, said = WRONG[name]
    found = problems(tmp_path, job)
    assert any(problem.startswith(said) for problem in found), found
    with pytest.raises(ValueError, match="validation error"):
        JobSpec.model_validate(job)


def test_a_problem_of_a_methods_space_has_its_line(tmp_path: Path) -> None:
    """The message points at the line of the bad value."""
    file = tmp_path / "job.yaml"
    bad = document({**METHODS, "lora": {**METHODS["lora"], "rank": -1}})
    file.write_text(yaml.safe_dump(bad, sort_keys=False))
    with pytest.raises(SpecError) as refused:
        load_job(file)
    (problem,) = refused.value.problems
    assert problem.line is not None
    assert file.read_text().splitlines()[problem.line - 1].strip() == "rank: -1"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "p_tuning", "search": {"space": {"init": "random"}}},
        {"method": None, "search": {}},
    ],
    ids=["one method", "no method"],
)
def test_a_null_method_needs_methods_in_the_space(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A single method may be named or left out, but null is none."""
    job = {**document(), **changes}
    if job["method"] is None:
        assert problems(tmp_path, job) == [
            "method: null is not allowed; leave the key out to take the default"
        ]
    else:
        assert JobSpec.model_validate(job).methods == ("p_tuning",)


def test_a_method_without_a_value_is_told_how_to_take_the_defaults(tmp_path: Path) -> None:
    """Leaving the key out, as for other sections, would leave out the method."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(document({**METHODS, "p_tuning": None})))
    with pytest.raises(SpecError) as refused:
        load_job(file)
    (problem,) = refused.value.problems
    assert problem.where == "search.space.method.p_tuning"
    assert problem.hint == "write {} to take the defaults"


def test_a_shared_setting_has_an_effect_if_one_method_reads_it() -> None:
    """Written prompts without demonstrations draw nothing by the seed, but prompts do."""
    methods = {"prompt_tuning": {}, "prompt_design": {}}
    assert JobSpec.model_validate(document(methods)).methods == tuple(methods)
    with pytest.raises(ValueError, match="has no effect"):
        JobSpec.model_validate(document({"prompt_design": {}}))


def test_the_schema_knows_the_spaces_of_methods() -> None:
    """An editor's schema refuses an unlisted method and an unknown dimension."""
    import jsonschema

    jsonschema.validate(document(), job_schema())
    for bad in ({"lorra": {}}, {"lora": {"rang": 4}}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document(bad), job_schema())
