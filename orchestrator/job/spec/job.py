"""The whole job, the checks across its sections, and its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

from pydantic import model_validator
from pydantic.json_schema import SkipJsonSchema

from orchestrator.job.labels import by_meaning, contradictions, label_key, spelled
from orchestrator.job.metrics import choice_of, compares_texts, names_of
from orchestrator.job.no_effect import without_effect
from orchestrator.job.spec.base import Conflict, Name, Section
from orchestrator.job.spec.base_model import BaseModelSpec
from orchestrator.job.spec.data import DataSpec
from orchestrator.job.spec.generation import GenerationSpec
from orchestrator.job.spec.methods import (
    BASELINES,
    RATES,
    REPARAMETERIZATIONS,
    SPACES,
    MethodName,
    Reparameterization,
    ReparameterizationSpec,
)
from orchestrator.job.spec.registry import RegistrySpec
from orchestrator.job.spec.resources import ResourcesSpec
from orchestrator.job.spec.search import Scheduler, SearchSpec
from orchestrator.job.spec.space import (
    BASELINE_SPACE,
    DIMENSIONS,
    SPACE_DEFAULTS,
    SpaceSpec,
    own_defaults,
)
from orchestrator.job.spec.template import (
    VIRTUAL,
    answer_in_input,
    template_columns,
    template_fields,
)
from orchestrator.job.spec.train import TrainSpec

METHOD_KEYS = ("method", "search.space.method")
"""The keys that say which methods a job has."""


class JobSpec(Section):
    """A tuning job: base model, data, method, search space, budget, registered model."""

    name: Name
    """Name of the search, and of the registered model unless registry.model is set."""
    base_model: BaseModelSpec
    """The frozen language model."""
    data: DataSpec
    """The rows, and how a row becomes input text and target."""
    method: MethodName | SkipJsonSchema[None] = "prompt_tuning"
    """The tuning method. It tunes virtual tokens (prompt_tuning), keys and values of every layer
    (prefix_tuning), or virtual tokens that a small network generates (p_tuning). The other methods
    are baselines: a written prompt (prompt_design), all weights (model_tuning; lomo updates each
    during the backward pass and stores neither gradients nor optimiser state), low-rank changes of
    the weights (lora; qlora where base_model.quantization rounds them), or added layers
    (adapter). It is left out where search.space.method lists several methods."""
    reparameterization: ReparameterizationSpec | None = None
    """The small network that generates the prompt; by default mlp for prefix_tuning and lstm for
    p_tuning."""
    search: SearchSpec = SearchSpec()
    """Trials to run, how to rank them and when to stop them."""
    train: TrainSpec = TrainSpec()
    """Settings for the training of one trial."""
    generation: GenerationSpec = GenerationSpec()
    """Generation of texts for bleu, rouge_l and f1."""
    resources: ResourcesSpec = ResourcesSpec()
    """Resources that the workers take from this machine or the cluster."""
    registry: RegistrySpec = RegistrySpec()
    """Registration of the best soft prompts."""

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return self.registry.model or self.name

    @property
    def methods(self) -> tuple[MethodName, ...]:
        """The methods of the trials, in the order of the spec."""
        return tuple(self.search.space.method or filter(None, [self.method]))

    @property
    def mixes(self) -> bool:
        """Tell whether search.space.method gives each of several methods a space of its own."""
        return self.search.space.method is not None

    @property
    def parts(self) -> list[JobSpec]:
        """The jobs of the single methods; this job alone unless it mixes methods."""
        return [self.of(method) for method in self.methods] if self.mixes else [self]

    def of(self, method: MethodName) -> JobSpec:
        """Return the job of one of the methods that this job mixes."""
        search = self.search.model_copy(update={"space": self.search.space.of(method)})
        return self.model_copy(update={"method": method, "search": search})

    @property
    def method_names(self) -> str:
        """The methods in words, such as ``method lora`` or ``each of lora and adapter``."""
        *others, last = self.methods
        return f"each of {', '.join(others)} and {last}" if others else f"method {last}"

    @property
    def reparameterization_type(self) -> Reparameterization:
        """The kind of network that generates the prompt: none, mlp or lstm.

        Only for a job of one method.
        """
        networks = REPARAMETERIZATIONS.get(self.method or "", ("none",))
        written = self.reparameterization if self.method in REPARAMETERIZATIONS else None
        return written.type if written else networks[0]

    @property
    def is_baseline(self) -> bool:
        """Tell whether no trial learns a soft prompt."""
        return all(method in BASELINES for method in self.methods)

    def result_name(self, method: str = "") -> str:
        """Return the name of the best trial in tables; ``method`` is its method in a mixed job."""
        name = method or self.method or ""
        return name.replace("_", " ") if name in BASELINES else "tuned prompt"

    @model_validator(mode="before")
    @classmethod
    def _whole_space(cls, document: Any) -> Any:
        """Give a baseline's space the defaults of its own dimensions, and drop those of prompts.

        A space of several methods keeps the dimensions that were written, in each of its parts.
        """
        search = _plain(document.get("search")) if isinstance(document, Mapping) else None
        space = None if search is None else _plain(search.get("space"))
        if search is None or space is None:
            return document  # not a mapping: the regular validation reports it
        if isinstance(space.get("method"), Mapping):
            whole = {**dict.fromkeys(DIMENSIONS), **space, "method": _whole_parts(space["method"])}
            document = {"method": None, **document}
        elif document.get("method") in BASELINES:
            whole = {**own_defaults(document["method"]), **space}
        else:
            return document
        made = SpaceSpec.model_validate(whole, context=BASELINE_SPACE)
        return {**document, "search": {**search, "space": made}}

    def _space_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for dimensions of other methods and for missing ones of this method."""
        (method,) = self.methods
        dimensions, space = SPACES[method], self.search.space
        for name in DIMENSIONS:
            if name in space.given and name not in dimensions:
                text = (
                    f"method {self.method} has no {name}; leave it out, its space has "
                    f"{', '.join(dimensions)}"
                )
                yield Conflict(f"search.space.{name}", text, METHOD_KEYS)
            elif (
                name in dimensions
                and name not in SPACE_DEFAULTS
                and name != "template"
                and getattr(space, name) is None
            ):
                yield Conflict(
                    f"search.space.{name}", f"method {self.method} needs a {name}", METHOD_KEYS
                )
        if (
            self.is_baseline
            and "learning_rate" in dimensions
            and "learning_rate" not in space.model_fields_set
        ):
            text = (
                f"method {self.method} has no default, since soft prompts' rates are far too "
                "large for it"
            )
            hint = f"write for instance {{loguniform: {RATES.get(method, RATES['adapter'])}}}"
            yield Conflict("search.space.learning_rate", f"{text}; {hint}", METHOD_KEYS)

    @property
    def _template_variants(self) -> list[str]:
        """The templates that the search compares."""
        variants: list[str] = []
        for space in self.search.space.parts.values():
            templates = space.template or []
            variants += [templates] if isinstance(templates, str) else templates
        return variants

    def _virtual_token_conflicts(self) -> Iterator[Conflict]:
        """Yield a conflict for each template that places virtual tokens, which baselines lack."""
        text = f"{{*}} places virtual tokens, and method {self.method} has none; drop it"
        if VIRTUAL in template_fields(self.data.template):
            yield Conflict("data.template", text, ("method",))
        for template in self._template_variants:
            if VIRTUAL in template_fields(template):
                yield Conflict("search.space.template", text, ("method",))

    def _baseline_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts of a method that is a baseline, also beside other methods."""
        yield from self._virtual_token_conflicts()
        if self.resources.workers_per_group > 1:
            text = (
                f"method {self.method} trains on one worker at a time; set 1, and raise "
                "resources.workers"
            )
            yield Conflict("resources.workers_per_group", text, ("method",))
        yield from self._quantization_conflicts()

    def _no_prompt_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts of a job in which no trial learns a soft prompt."""
        method, resources, registry = self.method_names, self.resources, self.registry
        if self.search.scheduler == "pbt" and not self.mixes:
            other_schedulers = [name for name in get_args(Scheduler) if name != "pbt"]
            text = (
                f"pbt compares trials side by side, and {method} trains one at a time; "
                f"use one of {', '.join(other_schedulers)}"
            )
            yield Conflict("search.scheduler", text, ("method",))
        if resources.trials_per_worker not in ("auto", 1):
            text = (
                f"{resources.trials_per_worker} trials can't share a model that {method} "
                "changes; leave it out"
            )
            yield Conflict("resources.trials_per_worker", f"{text} or set 1", ("method",))
        defaults = RegistrySpec()
        for key in ("model", "alias", "promote_if"):
            if getattr(registry, key) == getattr(defaults, key):
                continue
            text = (
                f"{method} makes no prompt to register or serve: its result is kept "
                "with its run; leave it out"
            )
            yield Conflict(f"registry.{key}", text, ("method",))
            break
        if set(self.methods) == {"prompt_design"} and self.train != TrainSpec():
            yield Conflict("train", "prompt_design trains nothing; leave train out", ("method",))

    def _quantization_conflicts(self) -> Iterator[Conflict]:
        rounded, keys = self.base_model.quantization, ("method",)
        if self.method == "qlora" and rounded == "none":
            text = (
                "qlora is lora over rounded weights; set int4 (as its paper) or int8, or use "
                "method lora"
            )
            yield Conflict("base_model.quantization", text, keys)
        if self.method == "lora" and rounded != "none":
            text = (
                f"lora over weights rounded to {rounded} is method qlora; say so, or leave "
                "quantization out"
            )
            yield Conflict("base_model.quantization", text, keys)
        if self.method in ("model_tuning", "lomo", "adapter") and rounded != "none":
            text = (
                f"method {self.method} does not go with rounded weights; leave it out, or use "
                "method qlora"
            )
            yield Conflict("base_model.quantization", text, keys)

    def _lomo_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for settings that need stored gradients or optimiser state."""
        train, keys = self.train, ("method",)
        if train.optimizer != "sgd":
            text = f"{train.optimizer} keeps state for every weight, and method lomo keeps none"
            yield Conflict("train.optimizer", f"{text}; set it to sgd", keys)
        elif train.momentum is not None:
            text = "sgd's momentum is kept for every weight, and method lomo keeps no such state"
            yield Conflict("train.momentum", f"{text}; leave it out, or use model_tuning", keys)
        if train.micro_batch_size is not None:
            text = "gradients can't accumulate over passes, since method lomo stores none"
            hint = "leave it out and lower train.batch_size, or use model_tuning"
            yield Conflict("train.micro_batch_size", f"{text}; {hint}", keys)

    def _answer_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for wordings of prompt_design that write the answer into the input."""
        for template in self._template_variants:
            for column, key in self.data.columns_with_answer(template).items():
                yield Conflict(
                    "search.space.template", answer_in_input(column, key), (key, "data.rename")
                )

    def _method_conflicts(self) -> Iterator[Conflict]:
        if self.mixes:
            yield from self._mix_conflicts()
        elif self.method is None:
            text = "null is not allowed; leave the key out to take the default"
            yield Conflict("method", text, ())
            return
        else:
            yield from self._own_conflicts()
        if self.is_baseline:
            yield from self._no_prompt_conflicts()
        yield from self._reparameterization_conflicts()

    def _own_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts of this job's only method."""
        yield from self._space_conflicts()
        yield from self._answer_conflicts()
        if self.is_baseline:
            yield from self._baseline_conflicts()
        if self.method == "lomo":
            yield from self._lomo_conflicts()
        if self.method == "prefix_tuning" and VIRTUAL in template_fields(self.data.template):
            text = (
                "{*} places virtual tokens, and a prefix has none; drop it, or use "
                "prompt_tuning or p_tuning"
            )
            yield Conflict("data.template", text, ("method",))

    def _mix_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts of a job that mixes methods, those of each method at its own keys."""
        key = "search.space.method"
        if self.method is not None and "method" in self.model_fields_set:
            text = f"{key} says which methods the search tries; leave method out"
            yield Conflict("method", text, (key,))
        for name in self.search.space.given:
            if not any(name in SPACES[method] for method in self.methods):
                text = f"none of {', '.join(self.methods)} has {name}; leave it out"
                yield Conflict(f"search.space.{name}", text, (key,))
        for method in self.methods:
            for where, message, reads in self.of(method)._own_conflicts():
                others = [each for each in reads if each not in METHOD_KEYS]
                yield Conflict(self.written_at(method, where), message, (key, where, *others))

    def written_at(self, method: MethodName, key: str) -> str:
        """Return where a job that mixes methods has the key of one of them."""
        parent, _, name = key.rpartition(".")
        space = self.search.space
        if parent != "search.space" or space.method is None:
            return key
        shared = name in space.given and name not in space.method[method].given
        return key if shared else f"{parent}.method.{method}.{name}"

    def _reparameterization_conflicts(self) -> Iterator[Conflict]:
        written = self.reparameterization
        if written is None:
            return
        with_networks = [method for method in self.methods if method in REPARAMETERIZATIONS]
        for method in with_networks or self.methods[:1]:
            allowed = REPARAMETERIZATIONS.get(method, ("none",))
            if written.type not in allowed:
                named = f"method {method}"
                if not with_networks and self.mixes:
                    named = " and ".join(self.methods)
                text = f"{written.type} does not go with {named}; use {' or '.join(allowed)}"
                yield Conflict("reparameterization.type", text, METHOD_KEYS)

    @property
    def columns(self) -> set[str]:
        """Columns that the templates, the target and the references name."""
        template_names: set[str] = set()
        for template in (self.data.template, *self._template_variants):
            template_names.update(template_columns(template))
        other_columns = [self.data.references, self.data.messages]
        return {*template_names, self.data.target, *filter(None, other_columns)}

    @property
    def generates(self) -> bool:
        """Tell whether evaluations generate texts because the metric compares them."""
        return compares_texts(self.search.ranked_by, self.data.verbalizer is not None)

    @property
    def max_generated_tokens(self) -> int:
        """Maximum length of a generated text, end token included."""
        return self.generation.max_tokens or self.data.max_target_tokens

    def _conflicts(self) -> Iterator[Conflict]:
        yield from self._method_conflicts()
        if self.data.verbalizer is None:
            yield from self._conflicts_without_verbalizer()
        else:
            yield from self._conflicts_with_verbalizer()
            for text in contradictions(self.data.verbalizer):
                yield Conflict("data.verbalizer", f"{text}; keep one of them", ())
        yield from self._weight_conflicts()
        yield from self._gate_conflicts()
        if self.search.scheduler == "pbt":
            yield from self._population_conflicts()
        if self.resources.sharding != "none" and self.base_model.quantization != "none":
            text = f"{self.resources.sharding} can't split weights with base_model.quantization"
            hint = "leave one of them out: rounded weights are a quarter of the size or less"
            keys = ("base_model.quantization",)
            yield Conflict(
                "resources.sharding", f"{text} {self.base_model.quantization}; {hint}", keys
            )
        if self.train.evaluate_every > self.train.steps:
            text = (
                f"{self.train.evaluate_every} is more than train.steps {self.train.steps}: no "
                "trial would be evaluated"
            )
            yield Conflict(
                "train.evaluate_every", f"{text}; evaluate at least once", ("train.steps",)
            )
        yield from (Conflict(*setting) for setting in without_effect(self))

    @property
    def perturbation_steps(self) -> int:
        """Steps between two comparisons of PBT."""
        return self.search.perturbation_steps or self.train.evaluate_every

    def _population_conflicts(self) -> Iterator[Conflict]:
        evaluate_every, steps = self.train.evaluate_every, self.train.steps
        if self.perturbation_steps % evaluate_every:
            text = (
                f"{self.perturbation_steps} is no multiple of train.evaluate_every "
                f"{evaluate_every}: trials are compared by their evaluations; choose a multiple"
            )
            yield Conflict("search.perturbation_steps", text, ("train.evaluate_every",))
        if self.perturbation_steps >= steps:
            is_written = self.search.perturbation_steps is not None
            keys = (
                "search.perturbation_steps" if is_written else "train.evaluate_every",
                "train.steps",
            )
            text = (
                f"{self.perturbation_steps} is not below train.steps {steps}: pbt would never "
                "compare trials"
            )
            yield Conflict(
                keys[0], f"{text} before their end; lower it", (*keys[1:], "search.scheduler")
            )
        if self.resources.workers == 1 and self.resources.trials_per_worker == 1:
            text = "pbt needs at least two trials at once, and resources leave room for one"
            hint = "raise resources.trials_per_worker, or use another scheduler"
            keys = ("resources.trials_per_worker", "resources.workers")
            yield Conflict("search.scheduler", f"{text}; {hint}", keys)

    def _gate_conflicts(self) -> Iterator[Conflict]:
        """Yield a conflict for a metric whose differences can't be tested."""
        metric, promote_if = self.search.ranked_by, self.registry.promote_if
        if promote_if == "significantly_better" and metric.kind == "custom":
            text = (
                f"{promote_if} needs a metric that the gate can compute from single rows, and "
                f"search.metric {metric.name} is a function of your own"
            )
            hint = "set it to better, or search.metric to one of the built-in metrics"
            yield Conflict("registry.promote_if", f"{text}; {hint}", ("search.metric",))

    def _weight_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for class weights without labels, or of labels that there are not."""
        weights, verbalizer = self.train.class_weights, self.data.verbalizer
        if weights is None:
            return
        key, keys = "train.class_weights", ("data.verbalizer",)
        if verbalizer is None:
            text = "the weights are those of labels and need data.verbalizer"
            yield Conflict(key, f"{text}; add one, or leave them out", keys)
        elif not isinstance(weights, str):
            labels_by_meaning = by_meaning(verbalizer)
            for label in weights:
                if label_key(label) not in labels_by_meaning:
                    text = f"{spelled(label)} is no label of data.verbalizer, which has"
                    labels = ", ".join(map(spelled, verbalizer))
                    yield Conflict(key, f"{text} {labels}; correct it or leave it out", keys)
            if len(by_meaning(weights)) < len(weights):
                yield Conflict(key, "two labels mean the same; keep one of them", ())

    def _conflicts_without_verbalizer(self) -> Iterator[Conflict]:
        if self.search.ranked_by.kind == "labels":
            # Point at what the user wrote: a metric that is only the default has no line.
            metric_is_written = "metric" in self.search.model_fields_set
            keys = ["data.verbalizer", "search.metric"]
            if metric_is_written:
                keys.reverse()
            text = f"search.metric {self.search.metric} ranks labels and needs data.verbalizer"
            other_metrics = choice_of(names_of("texts", "targets"))
            yield Conflict(
                keys[0], f"{text}; add one, or set search.metric to {other_metrics}", (keys[1],)
            )
        for method, space in self.search.space.parts.items():
            inits = space.init
            if "class_labels" in (inits if isinstance(inits, list) else [inits]):
                text = "class_labels needs data.verbalizer; add one or drop class_labels"
                key = "search.space.init"
                where = self.written_at(cast(MethodName, method), key) if method else key
                yield Conflict(where, text, ("data.verbalizer", key))

    def _conflicts_with_verbalizer(self) -> Iterator[Conflict]:
        if self.generates:
            text = (
                f"{self.search.metric} compares generated texts, and data.verbalizer makes the "
                "target a label"
            )
            hint = f"remove data.verbalizer, or set search.metric to {names_of('labels')[0]}"
            yield Conflict("search.metric", f"{text}; {hint}", ("data.verbalizer",))
        if self.data.references is not None:
            text = (
                "data.references are texts, and data.verbalizer makes the target a label; "
                "remove one of them"
            )
            yield Conflict("data.references", text, ("data.verbalizer",))


def _whole_parts(methods: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the spaces of several methods, in which None marks a dimension that was left out."""
    parts = {
        name: _plain(part) if isinstance(part, Section) else part for name, part in methods.items()
    }
    return {
        name: {**dict.fromkeys(DIMENSIONS), **part} if isinstance(part, Mapping) else part
        for name, part in parts.items()
    }


def _plain(section: Any) -> dict[str, Any] | None:
    """Return a section as it was written.

    The result is empty for a section that was left out, and None for a value that is no section.
    """
    if section is None:
        return {}
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else None


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job spec, for editors.

    It lists allowed keys, types, choices, defaults and descriptions. It can't express rules across
    keys, nor that a range is ordered; ``orchestrator.job.yaml.load_job`` checks those too.
    """
    schema = JobSpec.model_json_schema(mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "prompt-orchestrator job spec",
    }
