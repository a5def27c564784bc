"""The job spec: what a user writes in YAML, as frozen, strict models.

A default lives here and nowhere else: the command line, the docs and the JSON schema read it from these models.
This module imports neither torch nor Ray; ``job_file`` reads a YAML file into it and reports problems with lines.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator.job.labels import contradictions
from orchestrator.job.no_effect import without_effect

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
ALIAS_PATTERN = (
    r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"  # MLflow's own rule, narrower than a model's name
)
RESERVED_ALIAS = re.compile(r"^(latest|v\d+)$", re.IGNORECASE)
BUILTIN = "builtin:"
"""In front of the names of models and data that are made on the spot."""
QUICKSTART = f"{BUILTIN}quickstart"
DEFAULT_TRIALS = 16
MAX_TRIALS = 10_000
DEFAULT_BETAS = (0.9, 0.999)  # torch's own
MAX_LEARNING_RATE = (
    1000  # far above what any prompt trains with, far below what torch's arithmetic takes
)
MAX_BEAMS = 64  # each one is a row of its own in memory
DEFAULT_RANK = 8
DEFAULT_ALPHA = 16
DEFAULT_BOTTLENECK = 64
MAX_SHOTS = 64
MAX_SEED = 2**32 - 1  # the widest range that every random generator in use takes

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
VIRTUAL = "*"
"""In a template's braces: virtual tokens stand here."""
PREFIX, CONTINUATION = "prefix", "continuation"
"""Columns of a text that was cut in two."""
BLANK = "_"
"""In a template's braces: the answer stands here."""


def template_fields(template: str) -> list[str]:
    """What stands in braces, in order of appearance; doubled braces stand for themselves."""
    return [match.group(1) for match in FIELD.finditer(template) if match.group(1) is not None]


def template_columns(template: str) -> list[str]:
    """Columns named in braces, in order of appearance."""
    return [name for name in template_fields(template) if name not in (VIRTUAL, BLANK)]


def looks_like_path(text: str) -> bool:
    """Tell whether a name was meant as a path: hub ids are ``name`` or ``owner/name``."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1


# A value's own checks are written as predicates: "<value> names no column" is how job_file reports them.
def _checked_template(template: str) -> str:
    lone = re.search(r"[{}]", FIELD.sub("", template))
    if lone:
        raise ValueError(
            f"has a lone {lone.group()}; write {lone.group() * 2} for a brace, {{text}} for a column"
        )
    columns = template_columns(template)
    if not columns:
        raise ValueError(
            "names no column; write at least one column in braces, for instance {text}"
        )
    if template_fields(template).count(BLANK) > 1:
        raise ValueError("has more than one blank {_}; an answer has one place")
    if "" in columns:
        raise ValueError(
            "has braces without a column's name; write for instance {text}, or {{}} for the braces"
        )
    return template


def _free_alias(alias: str) -> str:
    if RESERVED_ALIAS.match(alias):
        raise ValueError("is reserved by MLflow (latest, v1, v2, ...); choose another alias")
    return alias


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("is not a range; write the smaller bound first")
    return bounds


AUTO = "auto"


def _one_character(delimiter: str) -> str:
    if delimiter == AUTO or (len(delimiter) == 1 and delimiter not in '"\r\n\0'):
        return delimiter
    if len(delimiter) == 1:
        raise ValueError("can't separate cells; write one other character, or auto")
    raise ValueError(
        'is not one character; write for instance ";" or, in double quotes, "\\t", or auto'
    )


def _known_encoding(name: str) -> str:
    if name == AUTO:
        return name
    try:
        codecs.getincrementaldecoder(name)
        sound = "text,1\n".encode(name).decode(name) == "text,1\n"
    except (LookupError, UnicodeError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            "is no encoding of text that Python knows; for instance utf-8, latin-1, cp1252, utf-16, auto"
        )
    return name


def answer_in_input(column: str, key: str) -> str:
    """Say that a template writes the answer into the input. ``key`` names the answer's column."""
    return f"writes {{{column}}} into the input, and {key} says that it is the answer; leave it out of the template"


T = TypeVar("T")
LACKING = {"may lack": "what only prompts have"}
"""Context in which a space is validated that may lack what only prompts have."""

BEGUN = {"begun": "by an earlier release"}
"""Context in which the job of a search that has begun is validated: conflicts are let pass, since a later release may
know more of them."""


def _only_baselines_lack(value: T, info: ValidationInfo) -> T:
    if value is None and info.context is not LACKING:
        raise ValueError("is not allowed; leave the key out to take the default")
    return value


def _without_repeats(values: list[T]) -> list[T]:
    seen: set[T] = set()
    for value in values:
        if value in seen:
            shown = value.model_dump() if isinstance(value, BaseModel) else value
            raise ValueError(f"lists {shown} twice; list each value once")
        seen.add(value)
    return values


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN)]
Alias: TypeAlias = Annotated[str, Field(pattern=ALIAS_PATTERN)]
PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
LearningRate: TypeAlias = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SEED)]
Fraction: TypeAlias = Annotated[float, Field(gt=0, lt=0.5)]
Bounds: TypeAlias = Annotated[
    tuple[LearningRate, LearningRate], Field(strict=False), AfterValidator(_ordered)
]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Betas: TypeAlias = Annotated[tuple[Decay, Decay], Field(strict=False, examples=[DEFAULT_BETAS])]
Choices: TypeAlias = Annotated[
    list[T],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_without_repeats),
]
Prompts: TypeAlias = Annotated[T | SkipJsonSchema[None], AfterValidator(_only_baselines_lack)]
"""What prompts always have; None in the space of a baseline that has no such thing, never in a file."""
Template: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_checked_template)]
Label: TypeAlias = int | float | bool | str
Delimiter: TypeAlias = Annotated[str, AfterValidator(_one_character)]
Encoding: TypeAlias = Annotated[str, AfterValidator(_known_encoding)]
Auto: TypeAlias = Literal["auto"]


class Conflict(NamedTuple):
    """Values that are each allowed and do not fit together. Keys are dotted, relative to the section that checks."""

    where: str  # the key to change first
    message: str
    reads: tuple[str, ...]  # the other keys that the check looked at


class Section(BaseModel):
    """A part of the job spec: unknown keys fail, types are exact, values never change after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def _conflicts(self) -> Iterator[Conflict]:
        """Checks across keys; a section with any overrides this."""
        return iter(())

    @model_validator(mode="after")
    def _values_fit_together(self, info: ValidationInfo) -> Self:
        if info.context is BEGUN:
            return self
        # One error with all conflicts: raising in the first check would hide the others.
        conflicts = tuple(self._conflicts())
        if conflicts:
            text = "; ".join(f"{conflict.where}: {conflict.message}" for conflict in conflicts)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": conflicts})
        return self


class BaseModelSpec(Section):
    """The frozen language model."""

    id: Text
    """Hub id, local folder, or a model made on the spot: builtin:quickstart, builtin:causal-s, ..."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto is float32 on a CPU and the model's own on an accelerator."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Round the frozen weights to 8 or 4 bits as they are read; needs the package bitsandbytes. The prompt stays
    float32."""
    allow_remote_code: bool = False
    """Run Python code that the model's folder or hub repository brings along. Only for sources that you trust."""

    @property
    def source(self) -> Literal["builtin", "folder", "hub"]:
        """Where the id alone says that the model is; a folder may also have the form of a hub id."""
        if self.id.startswith(BUILTIN):
            return "builtin"
        return "folder" if looks_like_path(self.id) else "hub"


class DataFiles(Section):
    """Local files: .jsonl, .ndjson, .json, .csv, .tsv or .parquet, also compressed: .csv.gz, .jsonl.zst, .tsv.bz2."""

    train: Text
    """File with the rows to train on."""
    validation: Text | None = None
    """Without one, a part of train is set aside."""
    test: Text | None = None
    """Without one, a part of train is set aside."""


CSV_FILE = re.compile(r"\.[ct]sv(\.(gz|zst|bz2))?$", re.IGNORECASE)


class CsvSpec(Section):
    """How CSV and TSV files are read. Every cell is text, exactly as it stands in the file."""

    delimiter: Delimiter = AUTO
    """The character between cells; auto: a comma in .csv files, a tab in .tsv files."""
    quoting: Literal["auto", "standard", "none"] = "auto"
    """standard: a cell may stand in double quotes, and a quote in it is written twice; none: a quote is a character
    like any other, and each line is a row; auto: standard for .csv files; none for .tsv files, but standard where every
    cell of the file is quoted."""
    encoding: Encoding = AUTO
    """Encoding of files without a byte order mark, as Python names it; auto: utf-8. A byte order mark (of UTF-8, UTF-16
    or UTF-32) always decides."""


class RowLimits(Section):
    """At most so many rows of a split, chosen by the split seed."""

    train: PositiveInt | None = None
    """Most rows of train; all unless given."""
    validation: PositiveInt | None = None
    """Most rows of validation; all unless given."""
    test: PositiveInt | None = None
    """Most rows of test; all unless given."""


class DataSpec(Section):
    """Where the rows come from and how a row becomes input text and target."""

    path: Text | DataFiles
    """Hub data set, files ({train: a.jsonl, validation: b.csv, test: c.parquet}), or data made on the spot:
    builtin:quickstart, builtin:reviews-mood, ..."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    rename: dict[str, str] = {}
    """Old column name to new one; a column that is absent is left alone."""
    where: dict[str, Label] = {}
    """Only the rows in which these columns have these values, for instance {relation: P19}; before columns are
    renamed. Values match as labels do: 1, 1.0 and "1" are the same."""
    empty: Literal["refuse", "drop", "keep"] = "refuse"
    """Rows whose template columns are missing or empty: refuse the data, drop these rows, or keep them and take an
    empty text."""
    template: Template
    """Input text, with the row's columns in braces, for instance "{text}\\nSpam or not?". {*} marks where virtual
    tokens stand (in front of everything without one), {_} where the answer stands (the end without one)."""
    target: Text
    """Column with the label (with a verbalizer) or with the text to generate (without one); of a list of texts the
    first."""
    references: Text | None = None
    """Column with a list of texts that are all right, for bleu, rouge_l and f1; without one, or where a row's list is
    empty, the target."""
    verbalizer: Annotated[dict[Label, Text], Field(min_length=1)] | None = None
    """Label to the text that stands for it, leading space included. Labels match by meaning: 1, 1.0 and "1" are the
    same label, and so are true and "true"; "007" is a text."""
    prefix_lm: Text | None = None
    """Column of plain text, cut in two at a place drawn by split_seed: the columns prefix and continuation. With method
    model_tuning, template "{prefix}" and target continuation this is LM adaptation; long continuations are cut."""
    sentinel: bool = False
    """Put the first sentinel token (<extra_id_0>) in front of every target: what an encoder-decoder model that was
    pretrained on span corruption alone expects there."""
    max_input_tokens: PositiveInt = 256
    """Longer inputs are cut at the end of their longest column; the template stays whole."""
    max_target_tokens: PositiveInt = 64
    """Longest target, end token included; longer ones are refused."""
    validation_fraction: Fraction = 0.1
    """Part of train set aside when there is no validation split."""
    test_fraction: Fraction = 0.1
    """Part of train set aside when there is no test split."""
    held_out: Literal["stratified", "random"] = "stratified"
    """How rows are set aside: stratified keeps each label's share, random pays no attention to labels (as searches did
    before there was a choice). Rows with the same input stay together either way."""
    split_seed: Seed = 0
    """Seed of the rows set aside and of the rows that limit keeps."""
    limit: RowLimits = RowLimits()
    """Use only so many rows of a split."""
    csv: CsvSpec = CsvSpec()
    """Delimiter, quoting and encoding of CSV and TSV files."""

    def columns_with_answer(self, template: str) -> dict[str, str]:
        """Return the columns of a template that hold the answer, each with the key that says so.

        A column that ``rename`` made is the same as the one that it was made from.
        """
        answers = {"data.target": getattr(self, "target", None), "data.references": self.references}
        return {
            column: key
            for key, answer in answers.items()
            for column in template_columns(template)
            if answer is not None and self._origins(column) & self._origins(answer)
        }

    def _origins(self, column: str) -> set[str]:
        """Return the columns of the source that a column is read from."""
        return {old for old, new in self.rename.items() if new == column} or {column}

    def _answer_conflicts(self) -> Iterator[Conflict]:
        template = getattr(self, "template", None)  # absent while problems are collected
        for column, key in self.columns_with_answer(template or "").items():
            name = key.removeprefix("data.")
            yield Conflict("template", answer_in_input(column, key), (name, "rename"))

    @property
    def source(self) -> Literal["builtin", "files", "hub"]:
        """Where the rows are."""
        if isinstance(self.path, DataFiles):
            return "files"
        return "builtin" if self.path.startswith(BUILTIN) else "hub"

    def _conflicts(self) -> Iterator[Conflict]:
        yield from self._answer_conflicts()
        yield from self._held_out_conflicts()
        yield from self._csv_conflicts()
        yield from self._prefix_lm_conflicts()

    def _held_out_conflicts(self) -> Iterator[Conflict]:
        files = getattr(self, "path", None)
        given = isinstance(files, DataFiles) and files.validation and files.test
        if given and self.held_out == "random":
            text = "random has no effect where data.path has validation and test; leave it out"
            yield Conflict("held_out", text, ("path",))

    def _csv_conflicts(self) -> Iterator[Conflict]:
        path = getattr(self, "path", "")  # absent while problems are collected
        files = path.model_dump().values() if isinstance(path, DataFiles) else []
        if self.csv != CsvSpec() and not any(file and CSV_FILE.search(file) for file in files):
            text = "has no effect: it concerns .csv and .tsv files, and data.path names none; leave it out"
            yield Conflict("csv", text, ("path",))

    def _prefix_lm_conflicts(self) -> Iterator[Conflict]:
        if self.prefix_lm is None:
            return
        made = "data.prefix_lm makes the columns prefix and continuation"
        if self.target != CONTINUATION:
            yield Conflict(
                "target",
                f"{self.target} is not what follows: {made}; set {CONTINUATION}",
                ("prefix_lm",),
            )
        if PREFIX not in template_columns(self.template):
            yield Conflict(
                "template",
                f"{made}, and the template lacks {{{PREFIX}}}; write it there",
                ("prefix_lm",),
            )
        if self.verbalizer is not None:
            yield Conflict(
                "verbalizer", f"{made}, texts and not labels; leave one of them out", ("prefix_lm",)
            )


class TextInit(Section):
    """Start from the embeddings of a text's tokens, cut or repeated to the prompt's length."""

    text: Text
    """Its tokens are the start; it may be longer or shorter than the prompt."""


class ArtifactInit(Section):
    """Start from another prompt of the same base model, cut or repeated to the length."""

    artifact: Text
    """Registered prompt (name, name@alias, name:version), or the folder of an exported one."""


class SampleVocabInit(Section):
    """Start from sampled tokens of the vocabulary."""

    sample_vocab: PositiveInt
    """Draw from so many of the most frequent tokens; the plain word sample_vocab draws from 5,000."""


class LogUniform(Section):
    """A range to draw from, evenly on a logarithmic scale."""

    loguniform: Bounds
    """Lowest and highest value."""


class Uniform(Section):
    """A range to draw from, evenly."""

    uniform: Bounds
    """Lowest and highest value."""


Shots: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SHOTS)]
Demonstrations: TypeAlias = Literal["random", "nearest"]
NamedInit: TypeAlias = Literal["random", "random_normal", "sample_vocab", "class_labels"]
Init: TypeAlias = NamedInit | TextInit | ArtifactInit | SampleVocabInit


class SpaceSpec(Section):
    """The search space: one value, a list to choose from, or a range to draw from."""

    init: Prompts[Init | Choices[Init]] = "sample_vocab"
    """How the virtual tokens start: random (uniform in [-0.5, 0.5]), random_normal (as wide as the vocabulary), from
    sampled vocabulary, from the labels' words, from a text, or from another prompt."""
    num_virtual_tokens: Prompts[PositiveInt | Choices[PositiveInt]] = 20
    """Length of the soft prompt."""
    rank: PositiveInt | Choices[PositiveInt] | None = None
    """Rank of the matrices of lora and qlora; 8 unless given."""
    alpha: PositiveInt | Choices[PositiveInt] | None = None
    """What lora and qlora add is multiplied by alpha / rank; 16 unless given."""
    bottleneck: PositiveInt | Choices[PositiveInt] | None = None
    """Width of an adapter's inner layer; 64 unless given."""
    template: Template | Choices[Template] | None = None
    """Wordings that prompt_design tries; data.template unless given."""
    shots: Shots | Choices[Shots] | None = None
    """Training rows with their answers that prompt_design writes in front of an input, fewer where the model's context
    ends; 0, which is none, unless given."""
    demonstrations: Demonstrations | Choices[Demonstrations] | None = None
    """How prompt_design takes these rows: random (by the seed, each label as often as any other), which they are unless
    given, or nearest (for each input those that share its rarest words)."""
    learning_rate: Prompts[LearningRate | Choices[LearningRate] | LogUniform | Uniform] = 0.3
    """Peak learning rate; soft prompts want large ones, and methods that change the model's weights have no default."""
    seed: Seed | Choices[Seed] = 0
    """Seed of a trial's initialisation and data order, or of its demonstrations."""


Metric: TypeAlias = Literal["accuracy", "exact_match", "bleu", "rouge_l", "f1", "loss"]
TEXT_METRICS = frozenset({"bleu", "rouge_l", "f1"})  # of generated texts against references


class StopSpec(Section):
    """Targets that end the search early."""

    metric: float | None = None
    """End once a trial's validation metric is at least as good as this."""
    minutes: PositiveFloat | None = None
    """Start no further step after so many minutes of search."""


class SearchSpec(Section):
    """Which trials to run, how to rank them and when to stop."""

    space: SpaceSpec = SpaceSpec()
    """What the trials differ in."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Trials to draw: the whole grid with searcher grid unless given, otherwise 16. A space with fewer points gives
    fewer."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """How trials are drawn from the space: spread at random, every combination, or each one after what the ones before
    it reached (optuna's TPE)."""
    scheduler: Literal["asha", "pbt", "median", "fifo"] = "asha"
    """How bad trials are stopped early; pbt lets them go on from a better trial's prompt with another learning rate,
    fifo stops none."""
    grace_steps: PositiveInt | None = None
    """First rung of ASHA (no trial is stopped before it); train.evaluate_every unless given."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """ASHA keeps one trial in so many at each rung."""
    perturbation_steps: PositiveInt | None = None
    """Steps between two comparisons of PBT, each of which lets bad trials copy good ones; train.evaluate_every unless
    given."""
    metric: Metric = "accuracy"
    """Validation metric that ranks trials: accuracy ranks the verbalizer's texts, exact_match asks for the target's
    tokens; bleu, rouge_l and f1 compare a generated text with the references."""
    mode: Literal["max", "min"] | None = None
    """max or min; by default what the metric means."""
    seed: Seed = 0
    """Seed of the draws from the space, and of the rows of the few-shot baseline."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 4
    """Training rows that the few-shot baseline writes in front of an input, fewer where the model's context ends; 0
    leaves the baseline out."""
    stop: StopSpec = StopSpec()
    """Targets that end the search early."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.mode not in (None, self.better):
            text = f"{self.mode} would look for the worst {self.metric}; leave mode out or set {self.better}"
            yield Conflict("mode", text, ("metric",))
        if self.searcher == "grid" and isinstance(self.space.learning_rate, LogUniform | Uniform):
            text = "grid needs listed values and space.learning_rate is a range; list values or use searcher random"
            yield Conflict("searcher", text, ("space.learning_rate",))
        yield from self._population_conflicts()
        target = self.stop.metric
        if target is not None and self.metric != "loss" and not 0 <= target <= 1:
            yield Conflict(
                "stop.metric",
                f"{target:g} is no {self.metric}: it lies between 0 and 1",
                ("metric",),
            )

    def _population_conflicts(self) -> Iterator[Conflict]:
        if self.scheduler != "pbt":
            if self.perturbation_steps is not None:
                text = f"search.perturbation_steps has no effect with search.scheduler {self.scheduler}"
                hint = "leave it out, or set search.scheduler to pbt"
                yield Conflict("perturbation_steps", f"{text}; {hint}", ("scheduler",))
            return
        if self.trials == 1:
            text = "pbt compares trials, and search.trials is 1; raise it, or use another scheduler"
            yield Conflict("scheduler", text, ("trials",))
        rates = self.space.learning_rate
        if isinstance(rates, float) or (isinstance(rates, list) and len(rates) == 1):
            text = "pbt changes the learning rate between the lowest and the highest of the space, and there is only one"
            hint = "make space.learning_rate a range or a list, or use another scheduler"
            yield Conflict("scheduler", f"{text}; {hint}", ("space.learning_rate",))

    @property
    def better(self) -> Literal["max", "min"]:
        """Which way the metric improves."""
        return "min" if self.metric == "loss" else "max"


class TrainSpec(Section):
    """How one trial is trained."""

    steps: PositiveInt = 500
    """Most optimiser steps of a trial."""
    batch_size: PositiveInt = 16
    """Rows in a step of one trial."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward at most, all of a step's unless given: gradients add up over the forwards, so that memory
    shrinks and the result stays."""
    evaluate_every: PositiveInt = 50
    """Steps between evaluations; each one reports metrics and a checkpoint."""
    loss_reduction: Literal["token_mean", "sum_per_row", "sum"] = "token_mean"
    """How a batch's token losses become one: their mean, the mean over rows of each row's sum (as in prefix tuning),
    or their sum (as T5X has it). It matters to sgd and clip_norm; adamw and adafactor rescale gradients themselves."""
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """Optimiser of the soft prompt."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the prompt times the learning rate by adamw and as it stands by adafactor (as T5X does); added to
    the gradient by sgd."""
    betas: Betas | None = None
    """Decay of adamw's first and second moment; [0.9, 0.999] unless given."""
    momentum: Decay | None = None
    """Momentum of sgd; none unless given."""
    clip_norm: PositiveFloat | None = None
    """Longest gradient of a trial, as the Euclidean norm over all that it trains; longer ones are scaled down."""
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """Course of the learning rate after the warmup; linear and cosine end at 0 after the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises evenly from 0 to its peak."""
    decay_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With schedule exponential, the learning rate is multiplied by this after every decay_steps."""
    decay_steps: PositiveInt | None = None
    """Steps between two decays of schedule exponential."""
    frozen_dropout: bool = False
    """Whether the frozen model's own dropout is active in training steps (published recipes differ)."""
    patience: PositiveInt | None = None
    """Stop a trial after so many evaluations without a better validation metric."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            text = f"{self.micro_batch_size} is more than train.batch_size {self.batch_size}: a step has no more rows"
            yield Conflict("micro_batch_size", f"{text}; lower it or leave it out", ("batch_size",))
        if self.warmup_steps >= self.steps:
            text = f"{self.warmup_steps} is not below train.steps {self.steps}: no trial would reach its learning rate"
            yield Conflict("warmup_steps", f"{text}; lower it", ("steps",))
        yield from self._only_with("betas", "optimizer", "adamw")
        yield from self._only_with("momentum", "optimizer", "sgd")
        for name in ("decay_rate", "decay_steps"):
            yield from self._only_with(name, "schedule", "exponential")
            if self.schedule == "exponential" and getattr(self, name) is None:
                yield Conflict("schedule", f"exponential needs train.{name}; add it", (name,))

    def _only_with(self, name: str, switch: str, value: str) -> Iterator[Conflict]:
        """A conflict when ``name`` is set and would have no effect."""
        chosen = getattr(self, switch)
        if getattr(self, name) is not None and chosen != value:
            text = f"train.{name} has no effect with train.{switch} {chosen}"
            yield Conflict(
                name, f"{text}; leave it out, or set train.{switch} to {value}", (switch,)
            )


class GenerationSpec(Section):
    """How texts are generated for bleu, rouge_l and f1."""

    max_tokens: PositiveInt | None = None
    """Most tokens of a text, end token included; data.max_target_tokens unless given."""
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] = 1
    """Beams of the beam search; 1 is greedy decoding."""


class ResourcesSpec(Section):
    """What the workers take of this machine or the cluster."""

    workers: PositiveInt | Auto = "auto"
    """Worker groups; auto is as many as there are GPUs for, or one a node without any, and more when nodes join."""
    workers_per_group: PositiveInt = 1
    """Workers that train the same trials, each on its part of every batch; the result is that of one worker."""
    trials_per_worker: PositiveInt | Auto = "auto"
    """Trials packed into one forward."""
    cpus_per_worker: PositiveInt | Auto = "auto"
    """Cores that a worker reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Accelerators that a worker reserves, 1 at most; 0 trains on the CPU."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp splits the frozen weights of the model's blocks among a group's workers, for models larger than a device."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.sharding != "none" and self.workers_per_group == 1:
            text = f"{self.sharding} splits the weights among a group's workers, and resources.workers_per_group is 1"
            yield Conflict(
                "sharding", f"{text}; raise it, or leave sharding out", ("workers_per_group",)
            )
        gpus = self.gpus_per_worker
        if not isinstance(gpus, str) and gpus > 1:
            text = f"{gpus:g}, and a worker trains on one GPU: the others would idle"
            hint = "set it to 1, and raise resources.workers, or resources.workers_per_group to train steps together"
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ())
        if self.workers_per_group > 1 and not isinstance(gpus, str) and 0 < gpus < 1:
            text = f"{gpus:g} would put several of a group's workers on one GPU, which can't talk to itself"
            hint = (
                "set it to 1, or set resources.workers_per_group to 1 and raise resources.workers"
            )
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ("workers_per_group",))


class RegistrySpec(Section):
    """What becomes of the best soft prompts."""

    model: Name | None = None
    """Registered model; the search's name unless given."""
    register_top: Annotated[int, Field(ge=0)] = 1
    """Register so many of the best trials; 0 registers none."""
    alias: Annotated[Alias, AfterValidator(_free_alias)] = "challenger"
    """Alias of the best new version; promoted to champion when it beats the champion on the same test split."""


Reparameterization: TypeAlias = Literal["none", "mlp", "lstm"]


class ReparameterizationSpec(Section):
    """A network that makes the prompt from fewer or freer numbers while it is trained; inference does not need it."""

    type: Reparameterization
    """none or mlp for prefix_tuning, lstm or mlp for p_tuning."""
    hidden_size: PositiveInt | None = None
    """Width of the network; by default 512 for prefix_tuning, half the model's width a direction for lstm, the model's
    width for the mlp of p_tuning."""


REPARAMETERIZATIONS: dict[str, tuple[Reparameterization, ...]] = {
    "prefix_tuning": ("mlp", "none"),
    "p_tuning": ("lstm", "mlp"),
}
"""Of the other methods: none."""

MethodName: TypeAlias = Literal[
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
    "prompt_design",
    "model_tuning",
    "lora",
    "qlora",
    "adapter",
]
PROMPT_SPACE = ("init", "num_virtual_tokens", "learning_rate", "seed")
LORA_SPACE = ("rank", "alpha", "learning_rate", "seed")
SPACES: dict[MethodName, tuple[str, ...]] = {
    "prompt_tuning": PROMPT_SPACE,
    "prefix_tuning": PROMPT_SPACE,
    "p_tuning": PROMPT_SPACE,
    "prompt_design": ("template", "shots", "demonstrations", "seed"),
    "model_tuning": ("learning_rate", "seed"),
    "lora": LORA_SPACE,
    "qlora": LORA_SPACE,
    "adapter": ("bottleneck", "learning_rate", "seed"),
}
"""What the trials of each method can differ in."""
BASELINES: tuple[MethodName, ...] = ("prompt_design", "model_tuning", "lora", "qlora", "adapter")
"""Methods that learn no soft prompt: what prompts are compared with."""
SPACE_DEFAULTS: dict[str, Any] = {
    "rank": DEFAULT_RANK, "alpha": DEFAULT_ALPHA, "bottleneck": DEFAULT_BOTTLENECK, "shots": 0,
    "demonstrations": "random",
}  # fmt: skip
"""Of the dimensions that only some methods have."""
RATES = {
    "model_tuning": "[0.00001, 0.001]",
    "adapter": "[0.0001, 0.01]",
}  # to start from; lora's are adapter's


class JobSpec(Section):
    """One tuning job: base model, data, method, search space, budget, registered model."""

    name: Name
    """Name of the search, and of the registered model unless registry.model says otherwise."""
    base_model: BaseModelSpec
    """The frozen language model."""
    data: DataSpec
    """Rows, and how a row becomes input text and target."""
    method: MethodName = "prompt_tuning"
    """What is tuned: virtual tokens, keys and values of every layer, or virtual tokens through a small network. Or a
    baseline: a written prompt (prompt_design), all weights (model_tuning), low-rank changes of them (lora; qlora where
    base_model.quantization rounds them), or layers in between (adapter)."""
    reparameterization: ReparameterizationSpec | None = None
    """The small network that makes the prompt; by default mlp for prefix_tuning and lstm for p_tuning."""
    search: SearchSpec = SearchSpec()
    """Which trials to run, how to rank and when to stop them."""
    train: TrainSpec = TrainSpec()
    """How one trial is trained."""
    generation: GenerationSpec = GenerationSpec()
    """How texts are generated for bleu, rouge_l and f1."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the workers take of the cluster."""
    registry: RegistrySpec = RegistrySpec()
    """What becomes of the best soft prompts."""

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return self.registry.model or self.name

    @property
    def reparameterization_type(self) -> Reparameterization:
        """none, mlp or lstm."""
        if self.reparameterization:
            return self.reparameterization.type
        return REPARAMETERIZATIONS.get(self.method, ("none",))[0]

    @property
    def is_baseline(self) -> bool:
        """Whether the method learns something else than a soft prompt."""
        return self.method in BASELINES

    @property
    def result_name(self) -> str:
        """What tables call the best trial."""
        return self.method.replace("_", " ") if self.is_baseline else "tuned prompt"

    @model_validator(mode="before")
    @classmethod
    def _space_of_baseline(cls, given: Any) -> Any:
        """A baseline's space has its own dimensions, with their defaults, and not those of prompts."""
        if not isinstance(given, Mapping) or given.get("method") not in BASELINES:
            return given
        search = _plain(given.get("search"))
        space = None if search is None else _plain(search.get("space"))
        if search is None or space is None:
            return given  # what is wrong with it is said later
        own = SPACES[given["method"]]
        none = {name: None for name in SpaceSpec.model_fields if name not in own}
        defaults = {name: value for name, value in SPACE_DEFAULTS.items() if name in own}
        made = SpaceSpec.model_validate({**none, **defaults, **space}, context=LACKING)
        return {**given, "search": {**search, "space": made}}

    def _space_conflicts(self) -> Iterator[Conflict]:
        """Dimensions of other methods, and those that this one needs."""
        own, space = SPACES[self.method], self.search.space
        given = {name for name in space.model_fields_set if getattr(space, name) is not None}
        for name in SpaceSpec.model_fields:
            if name in given and name not in own:
                text = f"method {self.method} has no {name}; leave it out, its space has {', '.join(own)}"
                yield Conflict(f"search.space.{name}", text, ("method",))
            elif (
                name in own
                and name not in SPACE_DEFAULTS
                and name != "template"
                and getattr(space, name) is None
            ):
                yield Conflict(
                    f"search.space.{name}", f"method {self.method} needs a {name}", ("method",)
                )
        if (
            self.is_baseline
            and "learning_rate" in own
            and "learning_rate" not in space.model_fields_set
        ):
            text = f"method {self.method} has no default, since soft prompts' rates are far too large for it"
            hint = f"write for instance {{loguniform: {RATES.get(self.method, RATES['adapter'])}}}"
            yield Conflict("search.space.learning_rate", f"{text}; {hint}", ("method",))

    def _baseline_conflicts(self) -> Iterator[Conflict]:
        method, resources, registry = self.method, self.resources, self.registry
        templates = self.search.space.template or []
        for where, template in [
            ("data.template", self.data.template),
            *(
                ("search.space.template", one)
                for one in ([templates] if isinstance(templates, str) else templates)
            ),
        ]:
            if VIRTUAL in template_fields(template):
                yield Conflict(
                    where,
                    f"{{*}} places virtual tokens, and method {method} has none; drop it",
                    ("method",),
                )
        if self.search.scheduler == "pbt":
            text = f"pbt compares trials side by side, and method {method} trains one at a time; use asha, median or"
            yield Conflict("search.scheduler", f"{text} fifo", ("method",))
        if resources.trials_per_worker not in ("auto", 1):
            text = f"{resources.trials_per_worker} trials can't share a model that method {method} changes; leave it out"
            yield Conflict("resources.trials_per_worker", f"{text} or set 1", ("method",))
        if resources.workers_per_group > 1:
            text = f"method {method} trains on one worker at a time; set 1, and raise resources.workers"
            yield Conflict("resources.workers_per_group", text, ("method",))
        if registry.model is not None or registry.alias != RegistrySpec().alias:
            key = "model" if registry.model is not None else "alias"
            text = f"method {method} makes no prompt to register or serve: its result is kept with its run; leave it out"
            yield Conflict(f"registry.{key}", text, ("method",))
        if method == "prompt_design" and self.train != TrainSpec():
            yield Conflict("train", "prompt_design trains nothing; leave train out", ("method",))
        yield from self._quantization_conflicts()

    def _quantization_conflicts(self) -> Iterator[Conflict]:
        rounded, keys = self.base_model.quantization, ("method",)
        if self.method == "qlora" and rounded == "none":
            text = "qlora is lora over rounded weights; set int4 (as its paper) or int8, or use method lora"
            yield Conflict("base_model.quantization", text, keys)
        if self.method == "lora" and rounded != "none":
            text = f"lora over weights rounded to {rounded} is method qlora; say so, or leave quantization out"
            yield Conflict("base_model.quantization", text, keys)
        if self.method in ("model_tuning", "adapter") and rounded != "none":
            text = f"method {self.method} does not go with rounded weights; leave it out, or use method qlora"
            yield Conflict("base_model.quantization", text, keys)

    def _answer_conflicts(self) -> Iterator[Conflict]:
        """Wordings of prompt_design that write the answer into the input."""
        wordings = self.search.space.template or []
        for template in [wordings] if isinstance(wordings, str) else wordings:
            for column, key in self.data.columns_with_answer(template).items():
                yield Conflict(
                    "search.space.template", answer_in_input(column, key), (key, "data.rename")
                )

    def _method_conflicts(self) -> Iterator[Conflict]:
        yield from self._space_conflicts()
        yield from self._answer_conflicts()
        if self.is_baseline:
            yield from self._baseline_conflicts()
        allowed = REPARAMETERIZATIONS.get(self.method, ("none",))
        if self.reparameterization_type not in allowed:
            text = f"{self.reparameterization_type} does not go with method {self.method}; use {' or '.join(allowed)}"
            yield Conflict("reparameterization.type", text, ("method",))
        if self.method == "prefix_tuning" and VIRTUAL in template_fields(self.data.template):
            text = "{*} places virtual tokens, and a prefix has none; drop it, or use prompt_tuning or p_tuning"
            yield Conflict("data.template", text, ("method",))

    @property
    def columns(self) -> set[str]:
        """Columns that the templates, the target and the references name."""
        more = self.search.space.template or []
        templates = [self.data.template, *([more] if isinstance(more, str) else more)]
        named = {column for template in templates for column in template_columns(template)}
        references = [self.data.references] if self.data.references else []
        return {*named, self.data.target, *references}

    @property
    def generates(self) -> bool:
        """Whether evaluations generate texts, because the metric compares them."""
        return self.search.metric in TEXT_METRICS

    @property
    def max_generated_tokens(self) -> int:
        """Most tokens of a generated text, end token included."""
        return self.generation.max_tokens or self.data.max_target_tokens

    def _conflicts(self) -> Iterator[Conflict]:
        yield from self._method_conflicts()
        if self.data.verbalizer is None:
            yield from self._needs_a_verbalizer()
        else:
            yield from self._needs_no_verbalizer()
            for text in contradictions(self.data.verbalizer):
                yield Conflict("data.verbalizer", f"{text}; keep one of them", ())
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
            text = f"{self.train.evaluate_every} is more than train.steps {self.train.steps}: no trial would be evaluated"
            yield Conflict(
                "train.evaluate_every", f"{text}; evaluate at least once", ("train.steps",)
            )
        yield from (Conflict(*setting) for setting in without_effect(self))

    @property
    def perturbation_steps(self) -> int:
        """Steps between two comparisons of PBT."""
        return self.search.perturbation_steps or self.train.evaluate_every

    def _population_conflicts(self) -> Iterator[Conflict]:
        every, steps = self.train.evaluate_every, self.train.steps
        if self.perturbation_steps % every:
            text = f"{self.perturbation_steps} is no multiple of train.evaluate_every {every}: trials are compared by"
            yield Conflict(
                "search.perturbation_steps",
                f"{text} their evaluations; choose a multiple",
                ("train.evaluate_every",),
            )
        if self.perturbation_steps >= steps:
            given = self.search.perturbation_steps is not None
            keys = ("search.perturbation_steps" if given else "train.evaluate_every", "train.steps")
            text = f"{self.perturbation_steps} is not below train.steps {steps}: pbt would never compare trials"
            yield Conflict(
                keys[0], f"{text} before their end; lower it", (*keys[1:], "search.scheduler")
            )
        if self.resources.workers == 1 and self.resources.trials_per_worker == 1:
            text = "pbt needs at least two trials at once, and resources leave room for one"
            hint = "raise resources.trials_per_worker, or use another scheduler"
            keys = ("resources.trials_per_worker", "resources.workers")
            yield Conflict("search.scheduler", f"{text}; {hint}", keys)

    def _needs_a_verbalizer(self) -> Iterator[Conflict]:
        if self.search.metric == "accuracy":
            # Point at what the user wrote: a metric that is only the default has no line of its own.
            chosen = "metric" in self.search.model_fields_set
            keys = (
                ("search.metric", "data.verbalizer")
                if chosen
                else ("data.verbalizer", "search.metric")
            )
            text = "search.metric accuracy ranks labels and needs data.verbalizer"
            others = "exact_match, bleu, rouge_l, f1 or loss"
            yield Conflict(keys[0], f"{text}; add one, or set search.metric to {others}", keys[1:])
        inits = self.search.space.init
        if "class_labels" in (inits if isinstance(inits, list) else [inits]):
            text = "class_labels needs data.verbalizer; add one or drop class_labels"
            yield Conflict("search.space.init", text, ("data.verbalizer",))

    def _needs_no_verbalizer(self) -> Iterator[Conflict]:
        if self.generates:
            text = f"{self.search.metric} compares generated texts, and data.verbalizer makes the target a label"
            hint = "remove data.verbalizer, or set search.metric to accuracy"
            yield Conflict("search.metric", f"{text}; {hint}", ("data.verbalizer",))
        if self.data.references is not None:
            text = "data.references are texts, and data.verbalizer makes the target a label; remove one of them"
            yield Conflict("data.references", text, ("data.verbalizer",))


def _plain(section: Any) -> dict[str, Any] | None:
    """A section as it was written, nothing for one that was left out; None for what is no section."""
    if section is None:
        return {}
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else None


def job_schema() -> dict[str, Any]:
    """JSON schema of the job spec, for editors: allowed keys, types, choices, defaults, descriptions.

    It can't say what holds across keys, nor that a range is ordered; ``job_file.load_job`` checks those too.
    """
    schema = JobSpec.model_json_schema(mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "prompt-orchestrator job spec",
    }
