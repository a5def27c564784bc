"""Baselines in the job spec: each has its own search space; keys that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import BadInput, SpecError
from orchestrator.job.space import TrialSpec, dimensions, draw, grid, longest, trial_count, trials
from orchestrator.job.spec import BASELINES, SPACES, JobSpec, MethodName, SearchSpec
from orchestrator.job.yaml import load_job
from orchestrator.search.study.tpe import Proposer

RATE = {"loguniform": [0.0001, 0.01]}
SPACE: dict[MethodName, dict[str, Any]] = {
    "prompt_design": {"shots": [0, 4], "demonstrations": ["random", "nearest"], "seed": [0, 1]},
    "model_tuning": {"learning_rate": RATE, "seed": [0, 1]},
    "lomo": {"learning_rate": RATE, "seed": [0, 1]},
    "lora": {"rank": [2, 8], "alpha": 8, "learning_rate": RATE},
    "qlora": {"learning_rate": [0.001, 0.01]},
    "adapter": {"bottleneck": [8, 64], "learning_rate": [0.001]},
}


def document(method: str, space: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a job of the method; ``changes`` replace whole sections."""
    model = {"id": "m", **({"quantization": "int4"} if method == "qlora" else {})}
    return {
        "name": "x",
        "base_model": model,
        "data": {
            "path": "p",
            "template": "{text}",
            "target": "label",
            "verbalizer": {0: " a", 1: " b"},
        },
        "method": method,
        "search": {
            "space": SPACE[method] if space is None else space,  # type: ignore[index]
            "trials": 4,
        },
        **({"train": {"optimizer": "sgd"}} if method == "lomo" else {}),
        **changes,
    }


def problems(tmp_path: Path, job: dict[str, Any]) -> list[str]:
    """Return the problems that ``validate`` finds in the job: each one's key and text."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    with pytest.raises(SpecError) as refused:
        load_job(file)
    return [f"{problem.where}: {problem.message}" for problem in refused.value.problems]


@pytest.mark.parametrize("method", BASELINES)
def test_a_baselines_job_is_loaded_saved_and_loaded_again(
    tmp_path: Path, method: MethodName
) -> None:
    """A job loads the same from its file and from the copy in the search's folder.

    Its trials have only the keys of their method.
    """
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(document(method)))
    job = load_job(file)
    file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True), sort_keys=False))
    assert load_job(file) == job == JobSpec.model_validate(job.model_dump())
    assert job.is_baseline and longest(job.search.space) == 0
    made = trials(job.search)
    assert len(set(made)) == len(made) == trial_count(job.search) > 0
    for trial in made:
        assert set(trial.config()) | {"template"} == {*SPACES[method], "template"}
        assert TrialSpec.from_config(trial.config()) == trial and trial.label().endswith(
            f"seed {trial.seed}"
        )


def test_what_is_left_out_has_the_methods_default() -> None:
    """LoRA has a default rank and alpha, an adapter a bottleneck, a design no demonstrations."""
    expected = {
        "qlora": {"rank": [8], "alpha": [16], "learning_rate": [0.001, 0.01], "seed": [0]},
        "prompt_design": {"shots": [0], "demonstrations": ["random"], "seed": [0]},
        "adapter": {"bottleneck": [64], "learning_rate": [0.001], "seed": [0]},
    }
    for method, wanted in expected.items():
        space = {} if method == "prompt_design" else {"learning_rate": wanted["learning_rate"]}
        job = JobSpec.model_validate(document(method, space))
        assert dimensions(job.search.space) == wanted
    assert dimensions(
        JobSpec.model_validate(document("lora", {"learning_rate": RATE})).search.space
    )["rank"] == [8]


def test_prompts_keep_their_space() -> None:
    """The baselines' dimensions do not change the trials of prompts."""
    assert list(dimensions(SearchSpec().space)) == [
        "init",
        "num_virtual_tokens",
        "learning_rate",
        "seed",
    ]
    (trial,) = draw(SearchSpec().space, 1, 0)
    assert trial.config() == {
        "init": "sample_vocab",
        "num_virtual_tokens": 20,
        "learning_rate": 0.3,
        "seed": 0,
    }


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an init": (
        document("lora", {"learning_rate": RATE, "init": "random"}),
        (
            "search.space.init: method lora has no init; leave it out, its space has rank, alpha, "
            "learning_rate, seed"
        ),
    ),
    "a rank for prompts": (
        document("prompt_tuning", {"rank": 4}),
        "search.space.rank: method prompt_tuning has no rank; leave it out, its space has init, "
        "num_virtual_tokens, "
        "learning_rate, seed",
    ),
    "a learning rate for a written prompt": (
        document("prompt_design", {"learning_rate": 0.1}),
        "search.space.learning_rate: method prompt_design has no learning_rate; leave it out, its "
        "space has template, "
        "shots, demonstrations, seed",
    ),
    "no learning rate": (
        document("model_tuning", {}),
        "method: method model_tuning has no default, since soft prompts' rates are far too large "
        "for it; write for "
        "instance {loguniform: [0.00001, 0.001]}",
    ),
    "a null": (
        document("lora", {"learning_rate": None}),
        "search.space.learning_rate: null is not allowed; leave the key out to take the default",
    ),
    "no wider bottleneck": (
        document("adapter", {"learning_rate": RATE, "bottleneck": 0}),
        (
            "search.space.bottleneck: 0 is not allowed; allowed: a whole number of at least 1, a "
            "list of them or null"
        ),
    ),
    "unknown demonstrations": (
        document("prompt_design", {"demonstrations": "best"}),
        (
            'search.space.demonstrations: "best" is not allowed; allowed: random, nearest, a list '
            "of them or null"
        ),
    ),
    "pbt": (
        document("lora", search={"space": SPACE["lora"], "scheduler": "pbt"}),
        "search.scheduler: pbt compares trials side by side, and method lora trains one at a "
        "time; use one of asha, median, fifo",
    ),
    "several slots": (
        document("adapter", resources={"trials_per_worker": 4}),
        (
            "resources.trials_per_worker: 4 trials can't share a model that method adapter "
            "changes; leave it out or set 1"
        ),
    ),
    "a group": (
        document("lora", resources={"workers_per_group": 2}),
        (
            "resources.workers_per_group: method lora trains on one worker at a time; set 1, and "
            "raise resources.workers"
        ),
    ),
    "a registered model": (
        document("lora", registry={"model": "other"}),
        "registry.model: method lora makes no prompt to register or serve: its result is kept "
        "with its run; leave it "
        "out",
    ),
    "virtual tokens": (
        document(
            "adapter",
            data={"path": "p", "template": "{*}{text}", "target": "label", "verbalizer": {0: "a"}},
        ),
        "data.template: {*} places virtual tokens, and method adapter has none; drop it",
    ),
    "virtual tokens in a wording": (
        document("prompt_design", {"template": ["{text} is", "{*}{text}"]}),
        (
            "search.space.template: {*} places virtual tokens, and method prompt_design has none; "
            "drop it"
        ),
    ),
    "training a written prompt": (
        document("prompt_design", train={"steps": 100}),
        "train: prompt_design trains nothing; leave train out",
    ),
    "qlora without rounding": (
        document("qlora", base_model={"id": "m"}),
        (
            "method: qlora is lora over rounded weights; set int4 (as its paper) or int8, or use "
            "method lora"
        ),
    ),
    "lora with rounding": (
        document("lora", base_model={"id": "m", "quantization": "int8"}),
        (
            "base_model.quantization: lora over weights rounded to int8 is method qlora; say so, "
            "or leave quantization out"
        ),
    ),
    "rounded weights that are to be trained": (
        document("model_tuning", base_model={"id": "m", "quantization": "int8"}),
        "base_model.quantization: method model_tuning does not go with rounded weights; leave it "
        "out, or use method "
        "qlora",
    ),
    "weights rounded for lomo": (
        document("lomo", base_model={"id": "m", "quantization": "int4"}),
        "base_model.quantization: method lomo does not go with rounded weights; leave it out, or "
        "use method qlora",
    ),
    "an optimiser's state": (
        document("lomo", train={"steps": 100}),
        "method: adamw keeps state for every weight, and method lomo keeps none; set it to sgd",
    ),
    "another optimiser's state": (
        document("lomo", train={"optimizer": "adafactor"}),
        "train.optimizer: adafactor keeps state for every weight, and method lomo keeps none; set "
        "it to sgd",
    ),
    "momentum": (
        document("lomo", train={"optimizer": "sgd", "momentum": 0.9}),
        "train.momentum: sgd's momentum is kept for every weight, and method lomo keeps no such "
        "state; leave it out, or use model_tuning",
    ),
    "gradients to accumulate": (
        document("lomo", train={"optimizer": "sgd", "micro_batch_size": 4}),
        "train.micro_batch_size: gradients can't accumulate over passes, since method lomo stores "
        "none; leave it out and lower train.batch_size, or use model_tuning",
    ),
    "a reparameterisation": (
        document("lora", reparameterization={"type": "mlp"}),
        "reparameterization.type: mlp does not go with method lora; use none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_what_does(tmp_path: Path, name: str) -> None:
    """There is one problem, at its key, with the allowed values.

    The spec models refuse the job too, without the command line.
    """
    job, said = WRONG[name]
    key, _, message = said.partition(": ")
    found = problems(tmp_path, job)
    assert any(problem.endswith(message) for problem in found) and len(found) == 1, found
    assert key in ("method", found[0].partition(": ")[0])
    with pytest.raises(ValueError, match="validation error"):
        JobSpec.model_validate(job)


def test_an_unknown_method_is_told_the_known_ones(tmp_path: Path) -> None:
    """For a misspelled method the message guesses the nearest name."""
    job = {**document("lora"), "method": "lorra"}
    (found,) = [problem for problem in problems(tmp_path, job) if problem.startswith("method")]
    assert "prompt_design, model_tuning, lomo, lora, qlora or adapter" in found


def test_a_trials_configuration_has_the_keys_of_one_method() -> None:
    """A configuration that lacks a key of its method is refused by name."""
    with pytest.raises(BadInput, match="has no alpha"):
        TrialSpec.from_config({"rank": 8, "learning_rate": 0.1, "seed": 0})
    with pytest.raises(BadInput, match="has no num_virtual_tokens"):
        TrialSpec.from_config({"init": "random", "learning_rate": 0.1, "seed": 0})


def test_tpe_proposes_trials_of_a_baseline() -> None:
    """TPE takes ranks from their scale and rates from their range, and repeats no trial."""
    job = JobSpec.model_validate(document("lora"))
    proposer = Proposer(job.search.model_copy(update={"searcher": "optuna", "trials": 8}))
    made = []
    while (spec := proposer.propose()) is not None:
        proposer.learn(len(made), 1.0 - abs(spec.learning_rate - 0.001))
        made.append(spec)
    assert (
        len(set(made)) == 8
        and {spec.rank for spec in made} == {2, 8}
        and {spec.alpha for spec in made} == {8}
    )


def test_a_grid_of_designs_runs_over_seeds_fastest() -> None:
    """Grid points that differ only in their seed are neighbours."""
    job = JobSpec.model_validate(document("prompt_design"))
    points = grid(job.search.space)
    assert [point.seed for point in points] == [0, 1] * 4 and {point.shots for point in points} == {
        0,
        4,
    }
