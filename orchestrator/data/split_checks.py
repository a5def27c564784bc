"""Checks for splits that give no reliable results.

Examples are a single class, a single input, rows shared by train and test, and few rows. A finding
is an error if every result would be meaningless, and a warning otherwise. Warnings are written to
the search's log, its report and its JSON document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from orchestrator.data.cells import cell_text
from orchestrator.data.dataset import SPLITS, RowSplits
from orchestrator.data.held_out import label_of
from orchestrator.data.source_row import Row, place_of
from orchestrator.data.template import Template
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec

FEW_ROWS = 10
"""A class with fewer rows than this gets a warning."""
SHOWN = 5  # classes that a message names
TEXT_WIDTH = 60  # characters of an input that a message shows
HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Finding:
    """A problem of the splits, and what to do about it."""

    severity: Literal["refuse", "warn"]
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message}. {self.hint[:1].upper()}{self.hint[1:]}."


def judge(
    rows: RowSplits,
    data: DataSpec,
    metric: str = "",
    *,
    learns: bool = True,
    begun: bool = False,
) -> tuple[str, ...]:
    """Return the warnings about the splits.

    ``metric`` and ``learns`` are as in ``check_splits``. ``begun`` is set for a search that is
    resumed and may have started before these checks existed: errors become warnings, so that the
    search can continue. Raises BadInput if every result would be meaningless.
    """
    findings = check_splits(rows, data, metric, learns=learns)
    refused = [finding for finding in findings if finding.severity == "refuse"]
    if refused and not begun:
        message = "; ".join(finding.message for finding in refused)
        hint = "; ".join(dict.fromkeys(finding.hint for finding in refused))
        raise BadInput(message, hint)
    return tuple(str(finding) for finding in findings)


def check_splits(
    rows: RowSplits, data: DataSpec, metric: str = "", *, learns: bool = True
) -> list[Finding]:
    """Find the problems of the three splits.

    ``metric`` is the metric that trials are ranked by, if it is known. ``learns`` is True if the
    method trains on the train split.
    """
    splits = _Splits(rows, data, learns)
    meaningless = [*_single_input(splits), *_single_answer(splits)]
    if meaningless:
        return meaningless  # all other findings would follow from these
    return [
        *_splits_of_one_input(splits),
        *_absent_classes(splits),
        *(_undefined_area(splits) if metric == "roc_auc" else []),
        *_small_classes(splits),
        *_shared_with_train(splits),
        *_shared_by_held_out(splits),
        *_contradictions(splits),
        *_columns_that_tell(splits),
    ]


def check_distinct_tokens(inputs: Mapping[str, Sequence[Sequence[int]]], max_tokens: int) -> None:
    """Refuse inputs that all become the same tokens.

    This happens when the inputs are cut before they differ, or when all their tokens are unknown.
    ``inputs`` are the ids of each split's rows. Raises BadInput.
    """
    ids = iter(tuple(row) for split in inputs.values() for row in split)
    first = next(ids)
    if all(row == first for row in ids):
        raise BadInput(
            f"all inputs have the same {len(first)} token ids, so nothing can be told apart",
            f"raise data.max_input_tokens (now {max_tokens}) if the texts differ only behind it, "
            "or choose a base model whose tokenizer knows their characters",
        )


@dataclass(frozen=True)
class _Splits:
    """The rows of the splits, with their inputs and labels as text."""

    rows: RowSplits
    data: DataSpec
    learns: bool

    @cached_property
    def inputs(self) -> dict[str, list[str]]:
        return {split: [self._input(row) for row in self.rows[split]] for split in SPLITS}

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """Each row's label as text, or the text to generate if there is no verbalizer."""
        return {split: [label_of(row, self.data) for row in self.rows[split]] for split in SPLITS}

    @property
    def has_classes(self) -> bool:
        return self.data.verbalizer is not None

    @property
    def judged(self) -> list[str]:
        """The splits that a result depends on: without train if the method does not learn."""
        return [split for split in SPLITS if split != "train" or self.learns]

    @cached_property
    def counts(self) -> dict[str, Counter[str]]:
        """Number of rows of each class, by split."""
        return {split: Counter(self.labels[split]) for split in SPLITS}

    @cached_property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(label for split in SPLITS for label in self.counts[split]))

    def place(self, split: str, index: int) -> str:
        """Name the place of a split's row."""
        row = self.rows[split][index]
        if getattr(row, "number", 0):
            return place_of(row, split)
        return f"row {index + 1} of {split}"

    @cached_property
    def _template(self) -> Template:
        return Template(self.data.template)

    def _input(self, row: Row) -> str:
        text = self._template.fill(row)
        if self.data.prefix_lm is None:
            return text
        return text + str(row[self.data.target])  # many texts may share a short prefix


def _single_input(splits: _Splits) -> Iterator[Finding]:
    """Report the same input in all rows of all splits."""
    distinct = set(chain(*splits.inputs.values()))
    if len(distinct) == 1:
        count, text = sum(splits.rows.counts.values()), next(iter(distinct))
        yield Finding(
            "refuse",
            f"all {count} rows have the same input {_short(text)}: nothing can be told apart",
            "correct the columns in data.template, or give rows whose inputs differ",
        )


def _single_answer(splits: _Splits) -> Iterator[Finding]:
    """Report the same label, or the same text to generate, in all rows of all splits."""
    if len(splits.classes) != 1 or splits.data.references is not None:
        return
    answer = _short(splits.classes[0])
    if splits.has_classes:
        yield Finding(
            "refuse",
            f"all rows have the label {answer}: accuracy would be 1.0 with any prompt",
            "give rows of at least two classes, or correct data.target",
        )
        return
    yield Finding(
        "refuse",
        f"all rows have the target {answer}: a prompt that ignores the input is always right",
        "give rows whose targets differ, or correct data.target",
    )


def _splits_of_one_input(splits: _Splits) -> Iterator[Finding]:
    for split in splits.judged:
        inputs = splits.inputs[split]
        if len(inputs) > 1 and len(set(inputs)) == 1:
            yield Finding(
                "warn",
                f"all {len(inputs)} rows of {split} have the same input {_short(inputs[0])}",
                f"give {split} rows whose inputs differ",
            )


def _absent_classes(splits: _Splits) -> Iterator[Finding]:
    """Find splits that lack a class which another split has."""
    if not splits.has_classes:
        return
    for split in splits.judged:
        present = splits.counts[split]
        absent = [label for label in splits.classes if label not in present]
        if absent:
            message = f"{split} has no row of {_classes(absent)}, which other splits have"
            yield Finding("warn", f"{message}: {_consequence(split, list(present))}", _more(split))


def _undefined_area(splits: _Splits) -> Iterator[Finding]:
    """Refuse splits on which the area under a class's ROC curve has no value."""
    for split in HELD_OUT:
        absent = [label for label in splits.classes if label not in splits.counts[split]]
        if absent:
            yield Finding(
                "refuse",
                f"search.metric roc_auc has no value on {split}, which has no row of "
                f"{_classes(absent)}",
                f"give {split} rows of every class, or rank by another metric, such as macro_f1",
            )


def _consequence(split: str, present: list[str]) -> str:
    """Say what follows if a split lacks classes; ``present`` are those that it has."""
    if len(present) == 1:
        answer = _short(present[0])
        if split == "train":
            return f"a prompt can only learn to answer {answer}"
        return f"a prompt that always answers {answer} has an accuracy of 1.0 there"
    if split == "train":
        return "a prompt can't learn what it never sees"
    return "its figures say nothing about what it lacks"


def _small_classes(splits: _Splits) -> Iterator[Finding]:
    """Find classes of which a split has a few rows only."""
    if not splits.has_classes:
        return
    for split in splits.judged:
        few = [(label, count) for label, count in splits.counts[split].items() if count < FEW_ROWS]
        if few:
            message = f"{split} has {_row_counts(few)}"
            if split == "train":
                reason = f"fewer than {FEW_ROWS} rows are few to learn a class from"
            else:
                reason = f"with fewer than {FEW_ROWS} rows the accuracy of a class is mostly chance"
            yield Finding("warn", f"{message}: {reason}", _more(split))


def _row_counts(counts: Sequence[tuple[str, int]]) -> str:
    """Write, for instance, "3 rows of class 'spam', 1 row of class 'ham' and 4 more classes"."""
    listed_classes = [
        f"{count} {_plural('row', count)} of class {_short(label)}"
        for label, count in counts[:SHOWN]
    ]
    return _listed(listed_classes, len(counts) - len(listed_classes), "more class", "more classes")


def _shared_with_train(splits: _Splits) -> Iterator[Finding]:
    """Find rows of validation or test whose inputs are also in train."""
    first_in_train = _first_places(splits.inputs["train"])
    for split in HELD_OUT:
        inputs = splits.inputs[split]
        shared = [index for index, text in enumerate(inputs) if text in first_in_train]
        if not shared:
            continue
        train_index = first_in_train[inputs[shared[0]]]
        example = f"{splits.place(split, shared[0])} and {splits.place('train', train_index)}"
        if len(shared) == len(inputs) and splits.learns:
            yield Finding(
                "refuse",
                f"every row of {split} has an input that train has too, for instance {example}: "
                f"{split} can't show what a prompt does with new inputs",
                f"give {split} other rows, or leave data.path.{split} out: train then gives a part",
            )
            continue
        yield Finding(
            "warn",
            f"{len(shared)} of {len(inputs)} rows of {split} have an input that train has too, "
            f"for instance {example}: its figures are too good",
            f"drop such rows from train or {split}",
        )


def _shared_by_held_out(splits: _Splits) -> Iterator[Finding]:
    """Find rows of test whose inputs are also in validation, by which trials are chosen."""
    first_in_validation = _first_places(splits.inputs["validation"])
    inputs = splits.inputs["test"]
    shared = [index for index, text in enumerate(inputs) if text in first_in_validation]
    if shared:
        validation_index = first_in_validation[inputs[shared[0]]]
        example = (
            f"{splits.place('test', shared[0])} and {splits.place('validation', validation_index)}"
        )
        yield Finding(
            "warn",
            f"{len(shared)} of {len(inputs)} rows of test have an input that validation has too, "
            f"for instance {example}: trials are ranked by validation, so the test figures of the "
            "best one are too good",
            "drop such rows from one of the two",
        )


def _contradictions(splits: _Splits) -> Iterator[Finding]:
    """Find inputs that have several labels within a split."""
    if not splits.has_classes:
        return
    for split in splits.judged:
        contradicting = _contradicting(splits.inputs[split], splits.labels[split])
        if not contradicting:
            continue
        first, second = next(iter(contradicting.values()))
        labels = [_short(splits.labels[split][index]) for index in (first, second)]
        places = [splits.place(split, index) for index in (first, second)]
        example = f"{places[0]} with {labels[0]} and {places[1]} with {labels[1]}"
        occur = "input occurs" if len(contradicting) == 1 else "inputs occur"
        yield Finding(
            "warn",
            f"{len(contradicting)} {occur} with different labels in {split}, "
            f"for instance {example}",
            "correct the labels, or drop such rows",
        )


def _contradicting(inputs: Sequence[str], labels: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the indices of two rows with different labels for each input that has such rows."""
    first = _first_places(inputs)
    pairs: dict[str, tuple[int, int]] = {}
    for index, text in enumerate(inputs):
        if labels[index] != labels[first[text]]:
            pairs.setdefault(text, (first[text], index))
    return pairs


def _columns_that_tell(splits: _Splits) -> Iterator[Finding]:
    """Find columns of the template that reveal the answer, for instance the label's name."""
    if splits.data.prefix_lm is not None:
        return
    answers = list(chain(*(splits.labels[split] for split in SPLITS)))
    rows = list(chain(*(splits.rows[split] for split in SPLITS)))
    if len(rows) < 2 * len(splits.classes) and splits.has_classes:
        return  # too few rows to tell a label's name from a text
    for column in Template(splits.data.template).columns:
        cells = [cell_text(row[column]) for row in rows]
        if cells == answers or (splits.has_classes and _correspond(cells, answers)):
            yield Finding(
                "warn",
                f"column {column!r} of data.template tells the answer: each has a value of its own",
                f"leave {{{column}}} out of the template, unless that is what the task is about",
            )


def _correspond(cells: Sequence[str], answers: Sequence[str]) -> bool:
    """Tell whether each distinct cell goes with one answer and each answer with one cell."""
    pairs = set(zip(cells, answers, strict=True))
    return len(pairs) == len(set(cells)) == len(set(answers))


def _first_places(inputs: Sequence[str]) -> dict[str, int]:
    """Return the index of the first row with each input."""
    places: dict[str, int] = {}
    for index, text in enumerate(inputs):
        places.setdefault(text, index)
    return places


def _classes(labels: Sequence[str]) -> str:
    """Write, for instance, "class 'a'", or "classes 'a', 'b' and 7 more classes"."""
    listed = [_short(label) for label in labels[:SHOWN]]
    names = _listed(listed, len(labels) - len(listed), "more class", "more classes")
    return f"{_plural('class', len(labels))} {names}"


def _listed(listed: Sequence[str], left_out: int, singular: str, plural: str) -> str:
    """Join texts with commas and a final "and"; the last part counts what was left out."""
    texts = list(listed)
    if left_out:
        texts.append(f"{left_out} {singular if left_out == 1 else plural}")
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def _more(split: str) -> str:
    """Say what to do if a split has too few rows of some classes."""
    if split == "train":
        return "give train more rows of such classes, or leave these classes out"
    return f"give {split} more rows of such classes, or read its figures with care"


def _plural(word: str, count: int) -> str:
    if count == 1:
        return word
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _short(text: str) -> str:
    """Quote a text, shortened to fit into a message."""
    return repr(text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 3]}...")
