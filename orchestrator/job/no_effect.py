"""Settings of a job spec that would have no effect beside its other settings.

A setting asks for something when its value differs from its default. Such a setting is a conflict
where nothing would read it. A setting that only repeats its default is not a conflict, because a
saved search writes every key.

``RULES`` is the table. ``spec`` calls ``without_effect``, so this module imports ``spec`` for types
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.job.metrics import choice_of, names_of

if TYPE_CHECKING:
    from orchestrator.job.spec import JobSpec, SpaceSpec

MADE_BY_PREFIX_LM = ("prefix", "continuation")
BARE_TEMPLATE = "{prompt}"
MISSING = object()


class NoEffect(NamedTuple):
    """A setting without effect: its key, a message for the user, and the other keys read."""

    key: str
    message: str
    reads: tuple[str, ...]


class Rule(NamedTuple):
    """A rule that tells when a key has no effect.

    ``reads`` are the keys that ``reason`` looks at. ``reason`` ends the sentence "KEY has no effect
    ..."; it is empty where the key has an effect. ``otherwise`` is what the user can do instead of
    leaving the key out. ``defaults`` are values that ask for nothing, besides the field's own
    default. ``needed`` marks a key that another setting requires, so that the user can't leave it
    out.
    """

    key: str
    reads: tuple[str, ...]
    reason: Callable[[JobSpec], str]
    otherwise: str
    defaults: tuple[Any, ...] = ()
    needed: bool = False


def without_effect(job: JobSpec) -> Iterator[NoEffect]:
    """Yield the settings that have no effect, each once.

    ``job`` may lack values: a rule is skipped where a key that it reads is missing.
    """
    if not job.mixes:
        yield from _without_effect(job, RULES)
        return
    yield from _without_effect(job, [rule for rule in RULES if not _is_of_space(rule)])
    yield from _without_effect_on_any_method(job)


def _is_of_space(rule: Rule) -> bool:
    return rule.key.startswith("search.space.")


def _without_effect_on_any_method(job: JobSpec) -> Iterator[NoEffect]:
    """Yield the dimensions without effect of a job that mixes methods.

    A shared dimension has an effect if it has one on any of the methods that take it.
    """
    rules = [rule for rule in RULES if _is_of_space(rule)]
    for rule in rules:
        name = rule.key.rpartition(".")[2]
        takers: dict[str, list[NoEffect | None]] = {}
        for method, space in job.search.space.parts.items():
            if getattr(space, name) is not None:
                key = job.written_at(method, rule.key)  # type: ignore[arg-type]
                found = _without_effect(job.of(method), [rule])  # type: ignore[arg-type]
                takers.setdefault(key, []).append(next(found, None))
        for key, settings in takers.items():
            first = settings[0]
            if first is not None and all(settings):
                message = first.message.replace(rule.key, key, 1)
                yield NoEffect(key, message, (*first.reads, "search.space.method"))


def _without_effect(job: JobSpec, rules: Sequence[Rule]) -> Iterator[NoEffect]:
    reported: set[str] = set()
    for rule in rules:
        if rule.key in reported or not _asks(job, rule):
            continue
        if any(_value(job, key) is MISSING for key in rule.reads):
            continue
        if reason := rule.reason(job):
            reported.add(rule.key)
            remedy = rule.otherwise if rule.needed else f"leave it out, or {rule.otherwise}"
            message = f"{rule.key} has no effect {reason}; {remedy}"
            yield NoEffect(rule.key, message, rule.reads)


def _asks(job: JobSpec, rule: Rule) -> bool:
    """Tell whether the rule's key has a value that differs from its default."""
    parent_key, _, name = rule.key.rpartition(".")
    section, value = _value(job, parent_key), _value(job, rule.key)
    if value is MISSING or value in rule.defaults:
        return False
    field = type(section).model_fields[name]
    return bool(value != field.get_default(call_default_factory=True))


def _value(job: JobSpec, key: str) -> Any:
    """Return the value at a dotted key, or MISSING where it or a section above it is absent."""
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name, MISSING)
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# Where the base model and the data come from


def _model_has_no_revisions(job: JobSpec) -> str:
    base = job.base_model
    return "" if base.source == "hub" else f"with base_model.id {base.id}: only a hub has revisions"


def _model_brings_no_code(job: JobSpec) -> str:
    base = job.base_model
    return f"with base_model.id {base.id}" if base.source == "builtin" else ""


def _data_is_not_the_hubs(job: JobSpec) -> str:
    data = job.data
    if data.source == "hub":
        return ""
    return "with files in data.path" if data.source == "files" else f"with data.path {data.path}"


def _built_in_data(job: JobSpec) -> str:
    data = job.data
    return f"with data.path {data.path}, which has that split" if data.source == "builtin" else ""


def _has_split(split: str) -> Callable[[JobSpec], str]:
    def reason(job: JobSpec) -> str:
        data = job.data
        if data.where:  # may leave a split without rows, which is then set aside from train
            return ""
        if data.source == "files" and getattr(data.path, split, None) is not None:
            return f"with data.path.{split}, which gives the split"
        return _built_in_data(job)

    return reason


def _nothing_drawn_by_split_seed(job: JobSpec) -> str:
    data = job.data
    draws = data.prefix_lm is not None or any(limit is not None for _, limit in data.limit)
    if draws or not all(_has_split(split)(job) for split in ("validation", "test")):
        return ""
    return "with a data.path that has every split: no row is set aside, and data.limit keeps all"


# How a row is read


def _renamed_before_the_cut(job: JobSpec) -> str:
    old_names = [name for name in job.data.rename if name not in MADE_BY_PREFIX_LM]
    if job.data.prefix_lm is None or not old_names:
        return ""
    columns = " and ".join(MADE_BY_PREFIX_LM)
    return f"on column {old_names[0]} with data.prefix_lm: rows then have only {columns}"


def _renamed_to_what_nothing_names(job: JobSpec) -> str:
    for old, new in job.data.rename.items():
        if new not in job.columns:
            return f"where it renames {old}: neither a template nor data.target names {new}"
    return ""


def _rows_are_no_conversations(job: JobSpec) -> str:
    data = job.data
    if data.messages is not None or (data.chat is not False and data.template == BARE_TEMPLATE):
        return ""
    return "without conversations in data.messages"


def _conversations_have_no_wordings(job: JobSpec) -> str:
    if job.data.messages is None:
        return ""
    return "with data.messages, whose conversations need no template"


def _texts_are_not_compared(job: JobSpec) -> str:
    if job.generates:
        return ""
    return f"with search.metric {job.search.metric}, for which no text is generated"


def _references_are_not_compared(job: JobSpec) -> str:
    if job.data.verbalizer is not None:  # JobSpec reports this as its own conflict
        return ""
    return _texts_are_not_compared(job)


def _targets_are_labels(job: JobSpec) -> str:
    if job.data.verbalizer is None:
        return ""
    return "with data.verbalizer, whose texts are the targets"


# The search


def _writes_no_demonstrations(job: JobSpec) -> str:
    shots = _listed(job.search.space.shots)
    if job.method != "prompt_design" or any(shots):
        return ""
    return "with search.space.shots 0"


def _draws_no_demonstrations(job: JobSpec) -> str:
    if job.method != "prompt_design":
        return ""
    if reason := _writes_no_demonstrations(job):
        return reason
    ways = _listed(job.search.space.demonstrations)
    return "with search.space.demonstrations nearest" if set(ways) == {"nearest"} else ""


def _nothing_drawn_by_search_seed(job: JobSpec) -> str:
    search = job.search
    takes_all = search.searcher == "grid" and (search.trials or math.inf) >= _grid_points(job)
    if not takes_all or search.few_shot or search.scheduler == "pbt" or search.confirm:
        return ""
    return "with search.searcher grid over every point, and search.few_shot 0"


def _grid_points(job: JobSpec) -> int:
    return sum(map(_points, job.search.space.parts.values()))


def _points(space: SpaceSpec) -> int:
    values = [value for name, value in space if name != "method" and value is not None]
    return math.prod(len(_listed(value)) for value in values)


def _other_scheduler_than(*schedulers: str) -> Callable[[JobSpec], str]:
    """Make a reason for a setting that only these schedulers read."""

    def reason(job: JobSpec) -> str:
        scheduler = job.search.scheduler
        return "" if scheduler in schedulers else f"with search.scheduler {scheduler}"

    return reason


def _trials_have_no_steps(job: JobSpec) -> str:
    if set(job.methods) != {"prompt_design"}:
        return ""
    return f"with {job.method_names}, whose trials have no steps"


def _confirms_nothing(job: JobSpec) -> str:
    return "" if job.search.confirm else "without search.confirm"


def _is_the_only_trial(job: JobSpec) -> str:
    if job.search.trials != 1:
        return ""
    return "with search.trials 1: there is no other trial to compare with"


def _grace_lasts_to_the_end(job: JobSpec) -> str:
    grace, steps = job.search.grace_steps, job.train.steps
    if grace is None or grace < steps:
        return ""
    return f"with train.steps {steps}: {grace} is not below it"


def _median_without_steps(job: JobSpec) -> str:
    return _trials_have_no_steps(job) if job.search.scheduler == "median" else ""


# Training


def _patience_outlasts_the_trial(job: JobSpec) -> str:
    train = job.train
    # The first evaluation is always the best so far, and the trial ends at the last step anyway.
    if train.patience is None or (1 + train.patience) * train.evaluate_every < train.steps:
        return ""
    return (
        f"with train.steps {train.steps} and train.evaluate_every {train.evaluate_every}: "
        f"a trial ends before {train.patience} evaluations can follow its first"
    )


def _decays_after_the_end(job: JobSpec) -> str:
    train = job.train
    length = train.steps - train.warmup_steps
    if train.schedule != "exponential" or train.decay_steps is None or train.decay_steps < length:
        return ""
    steps = f"train.steps {train.steps} and train.warmup_steps {train.warmup_steps}"
    return f"with {steps}: the learning rate never decays"


def _has_no_network(job: JobSpec) -> str:
    network = job.reparameterization
    return "with reparameterization.type none" if network and network.type == "none" else ""


# The registry


def _registers_nothing(job: JobSpec) -> str:
    # JobSpec reports the registry settings of a baseline as its own conflict.
    if job.is_baseline or job.registry.register_top:
        return ""
    return "with registry.register_top 0, which registers nothing"


def _has_no_prompts(job: JobSpec) -> str:
    top = job.registry.register_top
    if not job.is_baseline or top <= 1:
        return ""
    return f"above 1 with {job.method_names}, which makes no prompt to register"


HUB_MODEL = "name a model of the hub in base_model.id"
HUB_DATA = "name a data set of the hub in data.path"
GENERATE = f"set search.metric to {choice_of(names_of('texts'))}"
ASHA = "set search.scheduler to asha"
STOPPING = f"{ASHA} or median"
TRAINING = "use a method that trains"
REGISTERING = ("registry.register_top", "method")
SPLIT_KEYS = ("data.path", "data.where")

RULES: tuple[Rule, ...] = (
    Rule("base_model.revision", ("base_model.id",), _model_has_no_revisions, HUB_MODEL),
    Rule(
        "base_model.allow_remote_code", ("base_model.id",), _model_brings_no_code,
        "name another base_model.id",
    ),
    Rule("data.subset", ("data.path",), _data_is_not_the_hubs, HUB_DATA),
    Rule("data.revision", ("data.path",), _data_is_not_the_hubs, HUB_DATA),
    Rule(
        "data.validation_fraction", SPLIT_KEYS, _has_split("validation"),
        "leave out data.path.validation, so that it is set aside from train",
    ),
    Rule(
        "data.test_fraction", SPLIT_KEYS, _has_split("test"),
        "leave out data.path.test, so that it is set aside from train",
    ),
    Rule(
        "data.split_seed", (*SPLIT_KEYS, "data.limit", "data.prefix_lm"),
        _nothing_drawn_by_split_seed, "leave out data.path.test, or set data.limit",
    ),
    Rule(
        "data.rename", ("data.prefix_lm",), _renamed_before_the_cut,
        "name that column in data.prefix_lm as it is",
    ),
    Rule(
        "data.rename", ("data.template", "data.target", "data.references", "search.space.template"),
        _renamed_to_what_nothing_names, "correct the new name",
    ),
    Rule(
        "data.train_on", ("data.messages", "data.chat", "data.template"),
        _rows_are_no_conversations, "name the column of conversations in data.messages",
    ),
    Rule(
        "search.space.template", ("data.messages",), _conversations_have_no_wordings,
        "leave out data.messages",
    ),
    Rule(
        "data.references", ("search.metric", "data.verbalizer"), _references_are_not_compared,
        GENERATE,
    ),
    Rule(
        "data.max_target_tokens", ("data.verbalizer",), _targets_are_labels,
        "leave out data.verbalizer",
    ),
    Rule(
        "search.space.demonstrations", ("method", "search.space.shots"), _writes_no_demonstrations,
        "raise search.space.shots", defaults=("random",),
    ),
    Rule(
        "search.space.seed", ("method", "search.space.shots", "search.space.demonstrations"),
        _draws_no_demonstrations, "set search.space.shots and draw demonstrations at random",
    ),
    Rule(
        "search.seed",
        (
            "search.searcher", "search.trials", "search.few_shot", "search.scheduler",
            "search.space", "search.confirm",
        ),
        _nothing_drawn_by_search_seed, "set search.searcher to random",
    ),
    Rule("search.confirm", ("method",), _trials_have_no_steps, TRAINING),
    Rule("search.confirm_seeds", ("search.confirm",), _confirms_nothing, "set search.confirm"),
    Rule("search.scheduler", ("method",), _median_without_steps, "set it to fifo"),
    Rule(
        "search.grace_steps", ("search.scheduler",), _other_scheduler_than("asha", "median"),
        STOPPING,
    ),
    Rule("search.grace_steps", ("method",), _trials_have_no_steps, TRAINING),
    Rule("search.grace_steps", ("train.steps",), _grace_lasts_to_the_end, "lower it"),
    Rule("search.grace_steps", ("search.trials",), _is_the_only_trial, "raise search.trials"),
    Rule("search.reduction_factor", ("search.scheduler",), _other_scheduler_than("asha"), ASHA),
    Rule("search.reduction_factor", ("method",), _trials_have_no_steps, TRAINING),
    Rule("search.reduction_factor", ("search.trials",), _is_the_only_trial, "raise search.trials"),
    Rule(
        "train.patience", ("train.steps", "train.evaluate_every"), _patience_outlasts_the_trial,
        "lower it or train.evaluate_every",
    ),
    Rule(
        "train.decay_steps", ("train.steps", "train.warmup_steps", "train.schedule"),
        _decays_after_the_end, "lower it, or set train.schedule to constant", needed=True,
    ),
    Rule("generation.max_tokens", ("search.metric",), _texts_are_not_compared, GENERATE),
    Rule("generation.num_beams", ("search.metric",), _texts_are_not_compared, GENERATE),
    Rule(
        "reparameterization.hidden_size", ("reparameterization.type", "method"), _has_no_network,
        "set reparameterization.type to mlp",
    ),
    Rule("registry.alias", REGISTERING, _registers_nothing, "raise registry.register_top"),
    Rule("registry.model", REGISTERING, _registers_nothing, "raise registry.register_top"),
    Rule("registry.promote_if", REGISTERING, _registers_nothing, "raise registry.register_top"),
    Rule(
        "registry.register_top", ("method",), _has_no_prompts, "use a method that learns a prompt",
    ),
)  # fmt: skip
