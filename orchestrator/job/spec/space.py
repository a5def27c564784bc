"""The section ``search.space``: the dimensions in which the trials differ."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic.json_schema import SkipJsonSchema

from orchestrator.job.spec.base import (
    Bounds,
    Choices,
    LearningRate,
    PositiveInt,
    Section,
    Seed,
    T,
    Text,
)
from orchestrator.job.spec.methods import BASELINES, SPACES, MethodName
from orchestrator.job.spec.template import Template

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16
DEFAULT_BOTTLENECK = 64
MAX_SHOTS = 64
BASELINE_SPACE = {"space": "of a baseline"}
"""Validation context for a space that may lack the dimensions that only soft prompts have."""


def _none_only_for_baselines(value: T, info: ValidationInfo) -> T:
    if value is None and info.context is not BASELINE_SPACE:
        raise ValueError("is not allowed; leave the key out to take the default")
    return value


PromptDimension: TypeAlias = Annotated[
    T | SkipJsonSchema[None], AfterValidator(_none_only_for_baselines)
]
"""A dimension that soft prompts always have. It is None only in the space of a baseline that lacks
it, or where a space of several methods leaves it out, and never in a file."""


class TextInit(Section):
    """Start from the embeddings of a text's tokens, cut or repeated to the prompt's length."""

    text: Text
    """The text whose tokens the prompt starts from. It may be longer or shorter than the prompt."""


class ArtifactInit(Section):
    """Start from another prompt of the same base model, cut or repeated to the prompt's length."""

    artifact: Text
    """A registered prompt (name, name@alias, name:version), or the folder of an exported prompt."""


class SampleVocabInit(Section):
    """Start from sampled tokens of the vocabulary."""

    sample_vocab: PositiveInt
    """Draw from this many of the most frequent tokens. The plain word sample_vocab draws from
    5,000."""


class LogUniform(Section):
    """A range to draw from, uniformly on a logarithmic scale."""

    loguniform: Bounds
    """Lowest and highest value."""


class Uniform(Section):
    """A range to draw from, uniformly."""

    uniform: Bounds
    """Lowest and highest value."""


Shots: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SHOTS)]
Demonstrations: TypeAlias = Literal["random", "nearest"]
NamedInit: TypeAlias = Literal["random", "random_normal", "sample_vocab", "class_labels"]
Init: TypeAlias = NamedInit | TextInit | ArtifactInit | SampleVocabInit


class MethodSpace(Section):
    """The space of one method: one value, a list to choose from or, for learning_rate, a range."""

    init: PromptDimension[Init | Choices[Init]] = "sample_vocab"
    """Initialisation of the virtual tokens: random (uniform in [-0.5, 0.5]), random_normal (normal,
    with the standard deviation of the vocabulary's embeddings), sample_vocab (sampled tokens of the
    vocabulary), class_labels (the words of the labels), a text, or another prompt."""
    num_virtual_tokens: PromptDimension[PositiveInt | Choices[PositiveInt]] = 20
    """Length of the soft prompt."""
    rank: PositiveInt | Choices[PositiveInt] | None = None
    """Rank of the matrices of lora and qlora; 8 by default."""
    alpha: PositiveInt | Choices[PositiveInt] | None = None
    """Scale of lora and qlora, whose change of the weights is multiplied by alpha / rank; 16 by
    default."""
    bottleneck: PositiveInt | Choices[PositiveInt] | None = None
    """Width of an adapter's inner layer; 64 by default."""
    template: Template | Choices[Template] | None = None
    """Wordings that prompt_design tries; data.template by default."""
    shots: Shots | Choices[Shots] | None = None
    """Number of training rows, with their answers, that prompt_design writes in front of an input;
    0 by default. It writes fewer where the model's context is too short."""
    demonstrations: Demonstrations | Choices[Demonstrations] | None = None
    """Choice of these rows. random, the default, draws them by the seed, each label as often as any
    other. nearest takes for each input the rows that share its rarest words."""
    learning_rate: PromptDimension[LearningRate | Choices[LearningRate] | LogUniform | Uniform] = (
        0.3
    )
    """Peak learning rate. Soft prompts need a large one; methods that change the model's weights
    have no default."""
    seed: PromptDimension[Seed | Choices[Seed]] = 0
    """Seed of a trial's initialisation and data order, or of its demonstrations (prompt_design)."""

    @property
    def given(self) -> dict[str, Any]:
        """The dimensions that the user wrote here."""
        written = {name: getattr(self, name) for name in self.model_fields_set & DIMENSIONS.keys()}
        return {name: value for name, value in written.items() if value is not None}


DIMENSIONS = MethodSpace.model_fields
"""The dimensions of all methods, in the order in which a trial's configuration has them."""


class SpaceSpec(MethodSpace):
    """The search space: one value, a list to choose from or, for learning_rate, a range."""

    method: Annotated[dict[MethodName, MethodSpace], Field(min_length=1)] | None = None
    """The methods of a search that mixes several, each with its own space. The dimensions beside
    it are shared: a method that has such a dimension takes it from there unless its own space has
    it. The trials are divided evenly among the methods."""

    @property
    def parts(self) -> dict[str, SpaceSpec]:
        """The space of each method in a search that mixes methods; otherwise this one, under ""."""
        return {name: self.of(name) for name in self.method} if self.method else {"": self}

    def of(self, method: MethodName) -> SpaceSpec:
        """Return the space of one of the methods, as a search of that method alone has it."""
        own = self.method[method].given if self.method else {}
        shared = {name: value for name, value in self.given.items() if name in SPACES[method]}
        written = shared | own
        defaults = own_defaults(method) if method in BASELINES else {}
        return SpaceSpec.model_construct(_fields_set=set(written), **{**defaults, **written})


SPACE_DEFAULTS: dict[str, Any] = {
    "rank": DEFAULT_RANK, "alpha": DEFAULT_ALPHA, "bottleneck": DEFAULT_BOTTLENECK, "shots": 0,
    "demonstrations": "random",
}  # fmt: skip
"""Defaults of the dimensions that only some methods have."""


def own_defaults(method: MethodName) -> dict[str, Any]:
    """Return the defaults of a baseline's dimensions; None for the dimensions that it lacks."""
    own = SPACES[method]
    lacking = {name: None for name in DIMENSIONS if name not in own}
    return {**lacking, **{name: value for name, value in SPACE_DEFAULTS.items() if name in own}}
