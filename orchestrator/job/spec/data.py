"""The section ``data``: where the rows come from, and how a row becomes input text and target."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from orchestrator.job.spec.base import (
    AUTO,
    BUILTIN,
    Conflict,
    Fraction,
    Label,
    PositiveInt,
    Section,
    Seed,
    Text,
)
from orchestrator.job.spec.template import Template, answer_in_input, template_columns

PREFIX, CONTINUATION = "prefix", "continuation"
"""The two columns that ``data.prefix_lm`` cuts a text into."""
PROMPT, COMPLETION = "prompt", "completion"
"""The columns of a row that needs no template: an input, as a text or as messages, and its answer.

``data.messages`` turns conversations into such rows."""
BARE_TEMPLATE = f"{{{PROMPT}}}"
"""The template of such rows."""


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


Delimiter: TypeAlias = Annotated[str, AfterValidator(_one_character)]
Encoding: TypeAlias = Annotated[str, AfterValidator(_known_encoding)]


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


class ChatSpec(Section):
    """The conversation that the base model's chat template makes of a row."""

    system: Text
    """The system message of conversations that have none of their own."""


SpecialTokens: TypeAlias = Literal["text", "parse"]


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
    template: Template = BARE_TEMPLATE
    """Input text, with the row's columns in braces, for instance "{text}\\nSpam or not?". {*} marks
    where the virtual tokens stand (by default in front of everything), {_} where the answer stands
    (by default at the end). Rows with the columns prompt and completion need none."""
    target: Text = COMPLETION
    """Column with the label (with a verbalizer) or with the text to generate (without one). If the
    column holds a list of texts, its first text is the target."""
    messages: Text | None = None
    """Column with conversations: lists of {role, content} or of ShareGPT's {from, value}. The last
    answer of the assistant is the target, and what stands before it is the input, both in the base
    model's chat template. Such rows have no template and no target."""
    train_on: Literal["last", "all"] = "last"
    """Answers of a conversation that prompts are trained on. last: the last one. all: each answer
    of the assistant, as a row of its own. Validation and test use the last one."""
    chat: bool | ChatSpec = False
    """Put the filled template into the user's turn of the base model's chat template, and the
    answer into the assistant's. true, or {system: TEXT} for a system message in front. Prompts
    are then served in the same way."""
    special_tokens_in_text: SpecialTokens = "text"
    """Reading of control tokens, such as <|im_end|>, in the cells of rows and in requests. text:
    as the characters that they are, so that only templates write control tokens. parse: as
    control tokens."""
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
        columns: dict[str, str] = {}
        for key, answer in answers.items():
            if answer is None:
                continue
            for column in template_columns(template):
                if self._origins(column) & self._origins(answer):
                    columns[column] = key
        return columns

    def _origins(self, column: str) -> set[str]:
        """Return the source columns that a column is read from."""
        return {old for old, new in self.rename.items() if new == column} or {column}

    def _answer_conflicts(self) -> Iterator[Conflict]:
        template = getattr(self, "template", None)  # absent while problems are collected
        for column, key in self.columns_with_answer(template or "").items():
            name = key.removeprefix("data.")
            yield Conflict("template", answer_in_input(column, key), (name, "rename"))

    @property
    def uses_chat(self) -> bool:
        """Tell whether rows are put into the base model's chat template."""
        return self.messages is not None or self.chat is not False

    @property
    def system(self) -> str | None:
        """The system message of conversations that have none of their own."""
        return self.chat.system if isinstance(self.chat, ChatSpec) else None

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
        yield from self._lone_keys()
        yield from self._chat_conflicts()

    def _lone_keys(self) -> Iterator[Conflict]:
        """Yield a conflict if only one of template and target is written."""
        written_keys = [key for key in ("template", "target") if key in self.model_fields_set]
        if len(written_keys) == 1 and self.messages is None:
            (key,) = {"template", "target"} - set(written_keys)
            text = f"is missing: data.{written_keys[0]} is written, and goes with data.{key}"
            yield Conflict(key, f"{text}; add it, or leave both out for rows that need none", ())

    def _chat_conflicts(self) -> Iterator[Conflict]:
        """Yield conflicts of conversations with other ways to read a row."""
        if self.messages is not None:
            for key, bare in (("template", BARE_TEMPLATE), ("target", COMPLETION)):
                if getattr(self, key) != bare:
                    text = "does not go with data.messages, whose conversations need none"
                    yield Conflict(key, f"{text}; leave one of them out", ("messages",))
        if not self.uses_chat:
            return
        key = "chat" if self.messages is None else "messages"
        if self.prefix_lm is not None:
            text = "cuts plain text, which has no turns"
            yield Conflict("prefix_lm", f"{text}; leave it or data.{key} out", (key,))
        if self.sentinel:
            text = "is for encoder-decoder models, and chat templates are read by causal models"
            yield Conflict("sentinel", f"{text}; leave it or data.{key} out", (key,))

    def _held_out_conflicts(self) -> Iterator[Conflict]:
        files = getattr(self, "path", None)
        has_both_files = isinstance(files, DataFiles) and files.validation and files.test
        if has_both_files and self.held_out == "random":
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
        columns_made = "data.prefix_lm makes the columns prefix and continuation"
        if self.target != CONTINUATION:
            yield Conflict(
                "target",
                f"{self.target} is not what follows: {columns_made}; set {CONTINUATION}",
                ("prefix_lm",),
            )
        if PREFIX not in template_columns(self.template):
            yield Conflict(
                "template",
                f"{columns_made}, and the template lacks {{{PREFIX}}}; write it there",
                ("prefix_lm",),
            )
        if self.verbalizer is not None:
            yield Conflict(
                "verbalizer",
                f"{columns_made}, texts and not labels; leave one of them out",
                ("prefix_lm",),
            )
