"""Loading of rows from files, the hub or built-in data, and their division into splits.

All faults in the data are refused here, before training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from orchestrator.data.conversations import Conversations, every_answer
from orchestrator.data.held_out import held_out_inputs, label_of
from orchestrator.data.source_row import Row, SourceRow, place_of
from orchestrator.data.tables import read_table
from orchestrator.data.template import Template
from orchestrator.data.used_columns import UsedColumns
from orchestrator.errors import BadInput
from orchestrator.job.labels import NUMBER, label_key
from orchestrator.job.spec import BUILTIN, CONTINUATION, PREFIX, CsvSpec, DataFiles, DataSpec
from orchestrator.models.builtin import BUILTIN_DATA, builtin_rows
from orchestrator.models.source import hub_unreachable, looks_like_path
from orchestrator.utils.text import first_line

SPLITS = ("train", "validation", "test")
WORD = re.compile(r"\S+")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSplits:
    """The rows of the three splits, reduced to the columns that the job uses."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Messages to the user about changes to the rows."""

    def __getitem__(self, split: str) -> list[Row]:
        rows: list[Row] = getattr(self, split)
        return rows

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(self[split]) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """The sha256 of all rows in order."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for row in self[split]:
                digest.update(json.dumps([split, row], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """Compute the sha256 of some rows in order, of whatever split."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def load_rows(
    data: DataSpec,
    templates: Sequence[str] = (),
    files: Mapping[str, list[Row]] | None = None,
    *,
    begun: bool = False,
) -> RowSplits:
    """Load and check all three splits: no split is empty and no column is missing.

    ``templates`` are additional templates, whose columns are kept as well. ``files`` are the rows
    of the spec's files by split, if they have already been read. ``begun`` is set for a search that
    is resumed: a setting without effect does not stop it. Raises BadInput or Unreachable.
    """
    all_rows = wanted_rows(_read_all(data) if files is None else files, data)
    split_rows = {split: rows for split, rows in all_rows.items() if split in SPLITS}
    if not begun:
        _refuse_idle_fractions(split_rows, data)
    if data.prefix_lm:
        split_rows = {
            split: list(cut_in_two(rows, data.prefix_lm, data.split_seed))
            for split, rows in split_rows.items()
        }
    conversations = Conversations(data)
    split_rows = {
        split: list(conversations.read(rows, split)) for split, rows in split_rows.items()
    }
    used_columns = UsedColumns(data, _columns_of((data.template, *templates)))
    used_rows = {split: used_columns.cut(rows, split) for split, rows in split_rows.items()}
    for split, count in used_columns.dropped.items():
        if not used_rows[split]:
            raise BadInput(
                f"data.empty: drop leaves no row of {split}: {count} of {count} have no input",
                "fill in the columns that data.template names, or correct it",
            )
    splits = _split(used_rows, data)
    for split in SPLITS:
        if not splits[split]:
            raise _empty_split(split, used_rows, data)
    notes = (*_dropped_notes(used_columns.dropped, split_rows), *conversations.notes())
    return replace(splits, notes=notes)


def _columns_of(templates: Sequence[str]) -> list[str]:
    """Return the columns that the templates name, each once."""
    columns: dict[str, None] = {}
    for template in templates:
        columns |= dict.fromkeys(Template(template).columns)
    return list(columns)


def _dropped_notes(
    dropped: Mapping[str, int], splits: Mapping[str, Sequence[Row]]
) -> tuple[str, ...]:
    return tuple(
        f"data.empty: drop left out {count} of {len(splits[split])} rows of {split}, "
        "which have no input"
        for split, count in dropped.items()
    )


def _empty_split(split: str, splits: Mapping[str, list[Row]], data: DataSpec) -> BadInput:
    """Explain why a split has no rows, and what to do about it."""
    if split in splits:
        return BadInput(
            f"the {split} split is empty",
            f"give data.path.{split} at least one row, or leave it out",
        )
    template = Template(data.template)
    inputs = {template.fill(row) for row in splits["train"]}
    count = len(splits["train"])
    if len(inputs) == 1 and count > 1:
        return BadInput(
            f"all {count} rows of train have the same input {min(inputs)[:60]!r}: "
            f"no {split} split can be set aside",
            "correct the columns in data.template, or give rows whose inputs differ",
        )
    return BadInput(
        f"no {split} split can be set aside: the {count} rows of train have {len(inputs)} "
        "different inputs, and rows with the same input stay together",
        f"give train more rows, or name data.path.{split}",
    )


def load_split(data: DataSpec, split: str, further_columns: Sequence[str] = ()) -> list[Row]:
    """Load the rows of one split, reduced to the spec's columns and those in ``further_columns``.

    Raises BadInput or Unreachable.
    """
    splits = wanted_rows(_read_all(data), data)
    if not splits.get(split):
        names = ", ".join(sorted(name for name in splits if splits[name])) or "none"
        raise BadInput(
            f"the data has no rows in split {split!r}; it has {names}", "choose one of them"
        )
    rows = Conversations(data).read(splits[split], split)
    return UsedColumns(data, Template(data.template).columns, further_columns).cut(rows, split)


def _refuse_idle_fractions(splits: Mapping[str, list[Row]], data: DataSpec) -> None:
    """Raise BadInput for a fraction of a split that the data already has.

    This is checked here because only the data shows which splits it has.
    """
    for name, split in (("validation_fraction", "validation"), ("test_fraction", "test")):
        value = getattr(data, name)
        if split in splits and value != DataSpec.model_fields[name].default:
            raise BadInput(
                f"data.{name} {value} has no effect: the data has a {split} split",
                f"leave data.{name} out",
            )


def cut_in_two(rows: Sequence[Row], column: str, seed: int) -> Iterator[Row]:
    """Cut each text between two words at random, into a prefix and its continuation.

    This is the prefix LM objective of Raffel et al. 2020, section 3.1.2, with which Lester et al.
    2021 adapt T5. Texts of fewer than two words are left out. Raises BadInput for a row without a
    text in the column.
    """
    for number, row in enumerate(rows):
        source_row = row if isinstance(row, SourceRow) else SourceRow(row, number=number + 1)
        if not isinstance(text := row.get(column), str):
            raise BadInput(
                f"data.prefix_lm names column {column!r}, and {place_of(source_row, 'the data')} "
                f"has no text there; it has {sorted(row)}",
                "correct data.prefix_lm",
            )
        starts = [match.start() for match in WORD.finditer(text)][1:]
        if starts:
            prefix = text[: random.Random(f"{seed} {number}").choice(starts)].rstrip()
            yield source_row.with_cells({PREFIX: prefix, CONTINUATION: text[len(prefix) :]})


def wanted_rows(splits: Mapping[str, list[Row]], data: DataSpec) -> dict[str, list[Row]]:
    """Keep the rows of each split that match ``data.where``.

    Splits without such rows are left out. Raises BadInput when no row of any split matches, or when
    a column is in no row.
    """
    if not data.where:
        return dict(splits)
    for column in data.where:
        if not any(column in row for row in chain(*splits.values())):
            first_rows = (rows[0] for rows in splits.values() if rows)
            columns = sorted(set().union(*first_rows))
            raise BadInput(
                f"data.where names column {column!r}, which no row has; rows have {columns}",
                "correct data.where",
            )
    matching = {
        split: [row for row in rows if _is_wanted(row, data)] for split, rows in splits.items()
    }
    if not any(matching.values()):
        raise BadInput(
            f"no row matches data.where: {data.where}",
            "correct the values, or leave data.where out",
        )
    # A split without rows is left out, and is then set aside from train.
    return {split: rows for split, rows in matching.items() if rows}


def _is_wanted(row: Row, data: DataSpec) -> bool:
    return all(column in row and _means(row[column], value) for column, value in data.where.items())


def _means(cell: Any, value: Any) -> bool:
    try:
        return label_key(cell) == label_key(value)
    except BadInput:  # lists and objects never match
        return False


def _known_builtin(path: str) -> str:
    name = path.removeprefix(BUILTIN)
    if name not in BUILTIN_DATA:
        builtin_paths = ", ".join(BUILTIN + name for name in BUILTIN_DATA)
        raise BadInput(
            f"data.path {path!r} is unknown; built-in data sets are {builtin_paths}",
            "choose one of them",
        )
    return name


def _read_all(data: DataSpec) -> dict[str, list[Row]]:
    if isinstance(data.path, DataFiles):
        return {split: read_split(data, split) for split in SPLITS if getattr(data.path, split)}
    known_data(data.path)
    if data.path.startswith(BUILTIN):
        return {
            split: list(rows) for split, rows in builtin_rows(_known_builtin(data.path)).items()
        }
    return _read_hub(data, data.path)


def read_file(file: Path, where: str, options: CsvSpec | None = None) -> list[Row]:
    """Read the rows of one local file, and log decisions that the user may not expect."""
    table = read_table(file, where, options)
    for note in table.notes:
        log.warning("%s: %s", where, note)
    return list(table.rows)


def read_split(data: DataSpec, split: str) -> list[Row]:
    """Read the file that ``data.path`` names for a split."""
    return read_file(Path(getattr(data.path, split)), f"data.path.{split}", data.csv)


def known_data(path: str) -> None:
    """Raise BadInput unless a bare ``data.path`` is built-in data or looks like a hub data set."""
    if path.startswith(BUILTIN):
        _known_builtin(path)
    elif Path(path).expanduser().exists() or looks_like_path(path):
        hint = f"write the files one by one: --set data.path.train={path}"
        raise BadInput(f"data.path {path!r} is a path; files are named by split", hint)


def _quiet_datasets() -> None:
    """Silence the datasets library: its errors are also raised, and reported by this module."""
    from datasets import disable_progress_bars
    from datasets.utils import logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)


def _read_hub(data: DataSpec, name: str) -> dict[str, list[Row]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    _quiet_datasets()
    try:
        loaded = load_dataset(name, data.subset, revision=data.revision, trust_remote_code=False)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise hub_unreachable(f"data.path {name!r}", error) from None
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise BadInput(
            f"data.path {name!r} can't be loaded: {first_line(error)}",
            "see the data set's page on the hub",
        ) from None
    return {
        split: _named_labels(list(loaded[split]), loaded[split].features, data) for split in loaded
    }


def _named_labels(rows: list[Row], features: Mapping[str, Any], data: DataSpec) -> list[Row]:
    """Replace class numbers by class names if the verbalizer is written with names."""
    found = class_names(features, data.target, data.rename, data.verbalizer or {})
    if found is None:
        return rows
    column, names = found
    return [{**row, column: class_name(row[column], names)} for row in rows]


def class_names(
    features: Mapping[str, Any], target: str, rename: Mapping[str, str], labels: Iterable[Any]
) -> tuple[str, Sequence[str]] | None:
    """Find the column of the target and the names of its classes, if ``labels`` are such names.

    ``features`` are those of a data set of the hub. Returns None if the column has no named
    classes, or if the labels are its numbers.
    """
    renamed = {new: old for old, new in rename.items()}
    column = renamed.get(target, target)
    names = getattr(features.get(column), "names", None)
    keys = list(labels)
    if not names or not keys or not all(isinstance(key, str) for key in keys):
        return None
    if not set(keys) & set(names) and all(label_key(key)[0] == NUMBER for key in keys):
        return None  # "0" and "1" stand for the numbers
    return column, names


def class_name(number: Any, names: Sequence[str]) -> str | None:
    """Return the name of a class; None for -1, which data sets use for rows without a label."""
    return names[number] if number is not None and 0 <= number < len(names) else None


def _split(splits: dict[str, list[Row]], data: DataSpec) -> RowSplits:
    if "train" not in splits:
        raise BadInput(
            f"the data has no train split, only {sorted(splits)}", "name it under data.path.train"
        )
    train, rows_of = splits["train"], dict(splits)
    fractions = {"test": data.test_fraction, "validation": data.validation_fraction}
    missing = [split for split in fractions if split not in splits and train]
    for index, split in enumerate(missing):
        # Leave an input for train and for each split that comes later.
        inputs_to_keep = len(missing) - index
        train, rows_of[split] = set_aside(train, fractions[split], data, inputs_to_keep)
    # After the other splits are set aside, which must not see a part of one of its conversations.
    rows_of["train"] = list(every_answer(train)) if data.train_on == "all" else train
    limited = {
        split: _limit(rows_of.get(split, []), getattr(data.limit, split), data.split_seed)
        for split in SPLITS
    }
    return RowSplits(limited["train"], limited["validation"], limited["test"])


def set_aside(
    rows: list[Row], fraction: float, data: DataSpec, stays: int = 1
) -> tuple[list[Row], list[Row]]:
    """Divide rows into those kept and those held out, by ``data.held_out`` and ``data.split_seed``.

    Rows with the same input stay together, so that no input leaks into the other part. With
    ``held_out: stratified``, at least ``stays`` different inputs are kept.
    """
    template = Template(data.template)
    inputs = [template.fill(row) for row in rows]
    if data.held_out == "random":
        aside = _random_inputs(inputs, fraction, data.split_seed)
    else:
        labels = [label_of(row, data) for row in rows]
        pool_rare = data.verbalizer is None  # most texts to generate occur once
        aside = held_out_inputs(
            inputs, labels, fraction, data.split_seed, stays=stays, pool_rare=pool_rare
        )
    remaining = [row for text, row in zip(inputs, rows, strict=True) if text not in aside]
    return remaining, [row for text, row in zip(inputs, rows, strict=True) if text in aside]


def _random_inputs(inputs: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Draw the inputs to hold out regardless of their labels, as early versions did."""
    sizes = Counter(inputs)
    keys = list(sizes)
    random.Random(seed).shuffle(keys)
    row_target = max(1, round(fraction * len(inputs))) if len(keys) > 1 else 0
    aside: set[str] = set()
    count = 0
    for key in keys[:-1]:  # at least one input must be kept
        if count >= row_target:
            break
        aside.add(key)
        count += sizes[key]
    return aside


def _limit(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    indices = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in indices]
