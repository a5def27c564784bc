"""Settings without effect are conflicts, and the error names the cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from small_jobs import Command, small_job, write_job

from orchestrator.job.no_effect import RULES, without_effect
from orchestrator.job.spec import JobSpec, Section
from orchestrator.job.yaml import load_job

BASE: dict[str, Any] = {
    "name": "idle",
    "base_model": {"id": "nobody/model"},
    "data": {
        "path": "nobody/rows",
        "template": "{text}?",
        "target": "label",
        "verbalizer": {0: " no", 1: " yes"},
    },
}
"""A job on the hub's model and rows, where nearly every setting has an effect."""
FILES = "data.path={train: a.csv, validation: b.csv, test: c.csv}"
TRAIN = "data.path={train: a.csv}"
BUILTIN = "data.path=builtin:quickstart"
TEXTS = ("data.verbalizer=null", "search.metric=bleu")
DESIGN = "method=prompt_design"
CONVERSATIONS = (
    "data={path: nobody/rows, messages: turns}", "search.metric=loss",
)  # fmt: skip
TWO_RATES = "search.space.learning_rate=[0.1, 0.2]"
LORA = ("method=lora", "search.space.learning_rate=0.001")
EXPONENTIAL = ("train.schedule=exponential", "train.decay_rate=0.5")

IDLE: list[tuple[tuple[str, ...], str, str]] = [
    # overrides, the key without effect, another key that the message names
    (("base_model.id=./model", "base_model.revision=v2"), "base_model.revision", "base_model.id"),
    (("base_model.id=builtin:quickstart", "base_model.revision=v2"), "base_model.revision",
        "base_model.id"),
    (
        ("base_model.id=builtin:quickstart", "base_model.allow_remote_code=true"),
        "base_model.allow_remote_code", "base_model.id",
    ),
    ((TRAIN, "data.subset=sst2"), "data.subset", "data.path"),
    ((BUILTIN, "data.subset=sst2"), "data.subset", "data.path"),
    ((TRAIN, "data.revision=v2"), "data.revision", "data.path"),
    ((BUILTIN, "data.revision=v2"), "data.revision", "data.path"),
    ((FILES, "data.validation_fraction=0.2"), "data.validation_fraction", "data.path.validation"),
    ((BUILTIN, "data.validation_fraction=0.2"), "data.validation_fraction", "data.path"),
    ((FILES, "data.test_fraction=0.2"), "data.test_fraction", "data.path.test"),
    ((BUILTIN, "data.test_fraction=0.2"), "data.test_fraction", "data.path"),
    ((FILES, "data.split_seed=1"), "data.split_seed", "data.limit"),
    ((BUILTIN, "data.split_seed=1"), "data.split_seed", "data.limit"),
    (("data.rename={sms: message}",), "data.rename", "data.target"),
    (
        (
            "data.rename={body: text}", "data.prefix_lm=body", "data.template=\"{prefix}\"",
            "data.target=continuation", *TEXTS,
        ),
        "data.rename", "data.prefix_lm",
    ),
    (("data.train_on=all",), "data.train_on", "data.messages"),
    (("data.train_on=all", "data.chat=true"), "data.train_on", "data.messages"),
    ((*CONVERSATIONS, DESIGN, "search.space.template=[\"{prompt}?\"]"), "search.space.template",
        "data.messages"),
    (("data.verbalizer=null", "search.metric=loss", "data.references=all"), "data.references",
        "search.metric"),
    (("data.max_target_tokens=8",), "data.max_target_tokens", "data.verbalizer"),
    ((DESIGN, "search.space.demonstrations=nearest"), "search.space.demonstrations",
        "search.space.shots"),
    (
        (DESIGN, "search.space.shots=0", "search.space.demonstrations=[random, nearest]"),
        "search.space.demonstrations", "search.space.shots",
    ),
    ((DESIGN, "search.space.seed=[0, 1]"), "search.space.seed", "search.space.shots"),
    (
        (DESIGN, "search.space.shots=4", "search.space.demonstrations=nearest",
            "search.space.seed=1"),
        "search.space.seed", "search.space.demonstrations",
    ),
    (("search.searcher=grid", "search.few_shot=0", "search.seed=1"), "search.seed",
        "search.searcher"),
    (
        ("search.searcher=grid", TWO_RATES, "search.trials=2", "search.few_shot=0",
            "search.seed=1"),
        "search.seed", "search.searcher",
    ),
    ((DESIGN, "search.scheduler=median"), "search.scheduler", "method"),
    *(
        ((f"search.scheduler={scheduler}", TWO_RATES, "search.grace_steps=100"),
            "search.grace_steps",
         "search.scheduler")
        for scheduler in ("fifo", "pbt")
    ),
    *(
        ((f"search.scheduler={scheduler}", TWO_RATES, "search.reduction_factor=5"),
            "search.reduction_factor",
         "search.scheduler")
        for scheduler in ("fifo", "pbt", "median")
    ),
    *(
        ((f"search.scheduler={scheduler}", TWO_RATES, "search.perturbation_steps=100"),
         "search.perturbation_steps", "search.scheduler")
        for scheduler in ("fifo", "asha", "median")
    ),
    ((DESIGN, "search.confirm=2"), "search.confirm", "method"),
    (("search.confirm_seeds=4",), "search.confirm_seeds", "search.confirm"),
    ((DESIGN, "search.grace_steps=2"), "search.grace_steps", "method"),
    ((DESIGN, "search.reduction_factor=2"), "search.reduction_factor", "method"),
    (("search.grace_steps=500",), "search.grace_steps", "train.steps"),
    (("search.scheduler=median", "search.grace_steps=5000"), "search.grace_steps", "train.steps"),
    (("search.trials=1", "search.grace_steps=100"), "search.grace_steps", "search.trials"),
    (("search.trials=1", "search.reduction_factor=2"), "search.reduction_factor", "search.trials"),
    (("train.patience=9",), "train.patience", "train.steps"),
    (("train.betas=[0.9, 0.99]", "train.optimizer=sgd"), "train.betas", "train.optimizer"),
    (("train.momentum=0.9",), "train.momentum", "train.optimizer"),
    (("train.decay_rate=0.9",), "train.decay_rate", "train.schedule"),
    (("train.decay_steps=9",), "train.decay_steps", "train.schedule"),
    ((*EXPONENTIAL, "train.decay_steps=500"), "train.decay_steps", "train.steps"),
    ((*EXPONENTIAL, "train.warmup_steps=100", "train.decay_steps=400"), "train.decay_steps",
        "train.warmup_steps"),
    *(
        ((override, *more), override.partition("=")[0], "search.metric")
        for override in ("generation.max_tokens=8", "generation.num_beams=2")
        for more in (("search.metric=accuracy",), ("search.metric=loss", "data.verbalizer=null"))
    ),
    (
        ("method=prefix_tuning", "reparameterization={type: none, hidden_size: 8}"),
        "reparameterization.hidden_size", "reparameterization.type",
    ),
    (("reparameterization={type: none, hidden_size: 8}",), "reparameterization.hidden_size",
     "reparameterization.type"),
    (("registry.register_top=0", "registry.alias=best"), "registry.alias", "registry.register_top"),
    (("registry.register_top=0", "registry.model=spam"), "registry.model", "registry.register_top"),
    (("registry.register_top=0", "registry.promote_if=significantly_better"),
        "registry.promote_if", "registry.register_top"),
    ((*LORA, "registry.register_top=2"), "registry.register_top", "method"),
]  # fmt: skip

AT_WORK: list[tuple[str, ...]] = [
    # the nearest settings that do have an effect
    ("base_model.revision=v2",),
    ("base_model.id=./model", "base_model.allow_remote_code=true"),
    ("data.subset=sst2", "data.revision=v2", "data.test_fraction=0.2", "data.split_seed=1"),
    ("data.path={train: a.csv, test: c.csv}", "data.validation_fraction=0.2", "data.split_seed=1"),
    (FILES, "data.where={lang: en}", "data.test_fraction=0.2", "data.split_seed=1"),
    (FILES, "data.limit={train: 9}", "data.split_seed=1"),
    (BUILTIN, "data.limit={train: 9}", "data.split_seed=1"),
    (
        BUILTIN, "data.prefix_lm=text", "data.template=\"{prefix}\"", "data.target=continuation",
        *TEXTS,
        "data.split_seed=1",
    ),
    ("data.rename={sms: text, spam: label}",),
    (*CONVERSATIONS, "data.train_on=all", "data.rename={conversations: turns}"),
    ("data={path: nobody/rows, chat: true, train_on: all}", "search.metric=loss"),
    (DESIGN, "search.space.template=[\"{text}?\", \"{body}?\"]", "data.rename={sms: body}"),
    (*TEXTS, "data.references=all", "data.rename={texts: all}", "data.max_target_tokens=8"),
    (*TEXTS, "generation={max_tokens: 8, num_beams: 2}"),
    (DESIGN, "search.space.shots=[0, 4]", "search.space.demonstrations=[random, nearest]",
        "search.space.seed=1"),
    (DESIGN, "search.scheduler=fifo"),
    (DESIGN, "search.space.shots=0", "search.space.demonstrations=random"),
    ("search.space.seed=[1, 2]", "search.seed=1"),
    ("search.searcher=grid", "search.seed=1"),  # the seed of the few-shot baseline's rows
    ("search.searcher=grid", TWO_RATES, "search.trials=1", "search.few_shot=0", "search.seed=1"),
    ("search.grace_steps=499", "search.reduction_factor=2"),
    ("search.confirm=2", "search.confirm_seeds=4"),
    ("search.scheduler=median", "search.grace_steps=499"),
    ("search.scheduler=pbt", TWO_RATES, "search.perturbation_steps=100"),
    ("train.patience=8",),
    (*EXPONENTIAL, "train.decay_steps=499"),
    (*EXPONENTIAL, "train.warmup_steps=100", "train.decay_steps=399"),
    ("method=prefix_tuning", "reparameterization={type: mlp, hidden_size: 8}"),
    ("registry.register_top=2", "registry.alias=best", "registry.model=spam"),
    ("registry.promote_if=significantly_better",),
    (*LORA, "registry.register_top=0"),
]  # fmt: skip


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return file


def problems(command: Command, job_file: Path, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the problems that ``validate`` reports; check that it prints nothing else."""
    sets = [word for override in overrides for word in ("--set", override)]
    said = command("validate", job_file, "--spec-only", "--json", *sets)
    if said.code == 0:
        return []
    assert said.code == 2
    found: list[dict[str, Any]] = said.document["error"]["problems"]
    return found


@pytest.mark.parametrize(
    ("overrides", "key", "other"), IDLE, ids=[" ".join(case[0]) for case in IDLE]
)
def test_a_setting_without_effect_is_a_conflict(
    command: Command, job_file: Path, overrides: tuple[str, ...], key: str, other: str
) -> None:
    """There is one problem, at the key; it names the other key and the fix."""
    (problem,) = problems(command, job_file, overrides)
    assert problem["where"] == key
    assert f"{key} has no effect" in problem["message"]
    reason, remedy = problem["message"].rsplit("; ", 1)
    assert other in reason
    assert "leave it out, or " in remedy or key == "train.decay_steps"  # required by its schedule


@pytest.mark.parametrize("overrides", AT_WORK, ids=" ".join)
def test_a_setting_with_an_effect_is_none(
    command: Command, job_file: Path, overrides: tuple[str, ...]
) -> None:
    """Similar settings that do have an effect are accepted."""
    assert problems(command, job_file, overrides) == []


def test_every_rule_is_covered() -> None:
    """The table above has a case for each rule's key and each of its reasons."""
    covered = {key for _, key, _ in IDLE}
    assert {rule.key for rule in RULES} <= covered
    assert len(IDLE) > len(RULES)


def test_a_rule_names_keys_of_the_spec() -> None:
    """Rules only name keys that exist; a renamed key would silence its rule."""
    known = set(_keys(JobSpec))
    named = {key for rule in RULES for key in (rule.key, *rule.reads)}
    assert named - known == set()


def _keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += _keys(kind, f"{prefix}{name}.")
    return keys


def test_a_model_built_in_python_is_checked_too() -> None:
    """Specs built in Python are checked too, not only files."""
    search = {"scheduler": "fifo", "grace_steps": 100}
    with pytest.raises(
        ValidationError, match=r"search\.grace_steps has no effect with search\.scheduler fifo"
    ):
        JobSpec.model_validate({**BASE, "search": search})


def test_a_default_that_is_written_out_asks_for_nothing(tmp_path: Path) -> None:
    """Written-out defaults cause no conflict: saved searches and packed jobs contain every key."""
    for overrides in ((), ("search.scheduler=fifo", "registry.register_top=0", "data.rename={}")):
        job = load_job(write_job(tmp_path), overrides)
        file = tmp_path / "saved.yaml"
        file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True)), encoding="utf-8")
        assert load_job(file) == job


def test_a_job_that_lacks_values_gets_the_problems_of_the_others(
    command: Command, tmp_path: Path
) -> None:
    """A missing section or value silences only the rules that read it."""
    file = tmp_path / "job.yaml"
    file.write_text(
        "name: idle\nsearch: {scheduler: fifo, grace_steps: 4}\ndata: {subset: x}\n",
        encoding="utf-8",
    )
    found = {problem["where"] for problem in problems(command, file, ())}
    assert found == {
        "base_model",
        "data.path",
        "data.verbalizer",
        "search.grace_steps",
    }


def test_each_key_is_reported_once(tmp_path: Path) -> None:
    """If two rules find a key idle, only the first one reports it."""
    job = small_job(tmp_path).model_copy()
    search = job.search.model_copy(update={"scheduler": "fifo", "grace_steps": 10_000, "trials": 1})
    keys = [setting.key for setting in without_effect(job.model_copy(update={"search": search}))]
    assert keys == ["search.grace_steps"]
