"""Load rows from files, the hub or the quickstart, and split them; everything wrong is refused before training."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base_model import hub_unreachable, looks_like_path
from orchestrator.data.template import Template
from orchestrator.errors import BadInput
from orchestrator.quickstart import BUILTIN_DATA, builtin_rows
from orchestrator.spec import BUILTIN, CONTINUATION, PREFIX, DataFiles, DataSpec

Row = Mapping[str, Any]
SPLITS = ("train", "validation", "test")
WORD = re.compile(r"\S+")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class RowSplits:
    """Rows of the three splits, cut down to the columns that the job uses."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def __getitem__(self, split: str) -> list[Row]:
        rows: list[Row] = getattr(self, split)
        return rows

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(self[split]) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """sha256 over all rows in order."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for row in self[split]:
                digest.update(json.dumps([split, row], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """sha256 over some rows in order, whatever split they are."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def load_rows(data: DataSpec, templates: Sequence[str] = (), files: Mapping[str, list[Row]] | None = None) -> RowSplits:
    """All three splits, checked: no split is empty and no column is missing. Raises BadInput or Unreachable.

    ``templates`` are further ones, whose columns are kept too. ``files`` are the rows of the spec's files, by split,
    where they have been read already.
    """
    read = _read_all(data) if files is None else files
    found = {split: rows for split, rows in wanted_rows(read, data).items() if split in SPLITS}
    _refuse_idle_fractions(found, data)
    if data.prefix_lm:
        found = {split: list(cut_in_two(rows, data.prefix_lm, data.split_seed)) for split, rows in found.items()}
    named = [column for template in (data.template, *templates) for column in Template(template).columns]
    columns = [*dict.fromkeys([*named, data.target])]
    columns += [data.references] if data.references and data.references not in columns else []
    cut = {split: _columns(rows, columns, data, split) for split, rows in found.items()}
    splits = _split(cut, data)
    for split in SPLITS:
        if not splits[split]:
            raise BadInput(f"the {split} split is empty", f"give data.path.{split} at least one row, or leave it out")
    return splits


def load_split(data: DataSpec, split: str, more: Sequence[str] = ()) -> list[Row]:
    """The rows of one split, cut down to what the spec names and ``more`` columns. Raises BadInput or Unreachable."""
    found = wanted_rows(_read_all(data), data)
    if not found.get(split):
        known = ", ".join(sorted(name for name in found if found[name])) or "none"
        raise BadInput(f"the data has no rows in split {split!r}; it has {known}", "choose one of them")
    columns = [*Template(data.template).columns, data.target, *more, *([data.references] if data.references else [])]
    return _columns(found[split], list(dict.fromkeys(columns)), data, split)


def _refuse_idle_fractions(found: Mapping[str, list[Row]], data: DataSpec) -> None:
    """Raise BadInput for a fraction of a split that the data has: only the data itself shows that."""
    for name, split in (("validation_fraction", "validation"), ("test_fraction", "test")):
        value = getattr(data, name)
        if split in found and value != DataSpec.model_fields[name].default:
            raise BadInput(f"data.{name} {value} has no effect: the data has a {split} split", f"leave data.{name} out")


def cut_in_two(rows: Sequence[Row], column: str, seed: int) -> Iterator[Row]:
    """Each text of two words or more as a prefix and what follows it (the prefix LM objective of Raffel et al. 2020,
    section 3.1.2; Lester et al. 2021 adapt T5 with it), cut between two words at random."""
    for number, row in enumerate(rows):
        if not isinstance(text := row.get(column), str):
            raise BadInput(
                f"data.prefix_lm names column {column!r}, and row {number + 1} has no text there; it has {sorted(row)}",
                "correct data.prefix_lm",
            )
        starts = [match.start() for match in WORD.finditer(text)][1:]
        if starts:
            prefix = text[: random.Random(f"{seed} {number}").choice(starts)].rstrip()
            yield {PREFIX: prefix, CONTINUATION: text[len(prefix) :]}


def wanted_rows(found: Mapping[str, list[Row]], data: DataSpec) -> dict[str, list[Row]]:
    """Keep the rows of each split that ``data.where`` asks for. Raises BadInput where there are none."""
    if not data.where:
        return dict(found)
    for column in data.where:
        if not any(column in row for rows in found.values() for row in rows):
            known = sorted({name for rows in found.values() for row in rows[:1] for name in row})
            raise BadInput(f"data.where names column {column!r}, which no row has; rows have {known}", "correct it")
    kept = {split: [row for row in rows if _is_wanted(row, data)] for split, rows in found.items()}
    if not any(kept.values()):
        raise BadInput(f"no row is as data.where asks: {data.where}", "correct the values, or leave data.where out")
    return {split: rows for split, rows in kept.items() if rows}  # a split that has none is set aside from train


def _is_wanted(row: Row, data: DataSpec) -> bool:
    return all(column in row and row[column] == value for column, value in data.where.items())


def _known_builtin(path: str) -> str:
    bare = path.removeprefix(BUILTIN)
    if bare not in BUILTIN_DATA:
        known = ", ".join(BUILTIN + name for name in BUILTIN_DATA)
        raise BadInput(f"data.path {path!r} is unknown; built-in data sets are {known}", "choose one of them")
    return bare


def _read_all(data: DataSpec) -> dict[str, list[Row]]:
    if isinstance(data.path, DataFiles):
        return {split: read_split(data, split) for split in SPLITS if getattr(data.path, split)}
    known_data(data.path)
    if data.path.startswith(BUILTIN):
        return {split: list(rows) for split, rows in builtin_rows(_known_builtin(data.path)).items()}
    return _read_hub(data, data.path)


def read_split(data: DataSpec, split: str) -> list[Row]:
    """Read the file that ``data.path`` names for a split."""
    return read_file(Path(getattr(data.path, split)), f"data.path.{split}")


def known_data(path: str) -> None:
    """Raise BadInput unless a bare ``data.path`` names built-in data, or has the form of a hub data set."""
    if path.startswith(BUILTIN):
        _known_builtin(path)
    elif Path(path).expanduser().exists() or looks_like_path(path):
        hint = f"write the files one by one: --set data.path.train={path}"
        raise BadInput(f"data.path {path!r} is a path; files are named by split", hint)


def read_file(file: Path, where: str) -> list[Row]:
    """Rows of one local file; the reader is chosen by the suffix."""
    file = file.expanduser()
    if not file.is_file():
        raise BadInput(f"{where}: the file {file} does not exist (looked in {Path.cwd()})", "correct the path")
    if file.suffix not in READERS:
        raise BadInput(f"{where}: can't tell the format of {file}", f"use one of {', '.join(READERS)}")
    if not file.stat().st_size:
        return []
    from datasets import Dataset

    _quiet_datasets()
    options = {"sep": "\t"} if file.suffix == ".tsv" else {}
    reader = getattr(Dataset, f"from_{READERS[file.suffix]}")
    try:
        return list(reader(str(file), keep_in_memory=True, **options))
    except Exception as error:  # pyarrow, pandas and datasets each raise their own types
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
        if "corresponds to no data" in reason:  # a header without rows
            return []
        raise BadInput(f"{where}: {file} can't be read as {file.suffix[1:]}: {reason}", "correct the file") from None


def _quiet_datasets() -> None:
    """What it would log as an error is raised too, and said by us."""
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
            f"data.path {name!r} can't be loaded: {str(error).splitlines()[0][:300]}", "see the hub page"
        ) from None
    return {split: _named_labels(list(loaded[split]), loaded[split].features, data) for split in loaded}


def _named_labels(rows: list[Row], features: Mapping[str, Any], data: DataSpec) -> list[Row]:
    """Class numbers become class names where the verbalizer is written with names."""
    renamed = {new: old for old, new in data.rename.items()}
    column = renamed.get(data.target, data.target)
    names = getattr(features.get(column), "names", None)
    keys = list(data.verbalizer or {})
    if not names or not keys or not all(isinstance(key, str) for key in keys):
        return rows
    return [{**row, column: names[row[column]]} for row in rows]


def _columns(rows: Sequence[Row], columns: Sequence[str], data: DataSpec, split: str) -> list[Row]:
    """Rows cut down to the named columns, after renaming. BadInput names what is missing, or no list of texts."""
    cut: list[Row] = []
    for number, raw in enumerate(rows, start=1):
        row = {**raw, **{new: raw[old] for old, new in data.rename.items() if old in raw}}
        for column in columns:
            if column not in row:
                key = {data.target: "data.target", data.references: "data.references"}.get(column, "data.template")
                raise BadInput(
                    f"{key} names column {column!r}, which row {number} of {split} lacks; it has {sorted(row)}",
                    f"correct {key}, or map the column with data.rename",
                )
        if row[data.target] is None:
            raise BadInput(
                f"row {number} of {split} has no value in the target column {data.target!r}", "fill or drop it"
            )
        if data.references is not None:
            _check_references(row[data.references], data.references, f"row {number} of {split}")
        cut.append({column: row[column] for column in columns})
    return cut


def _check_references(cell: Any, column: str, where: str) -> None:
    if cell is not None and not (isinstance(cell, list) and all(isinstance(text, str) for text in cell)):
        raise BadInput(
            f"{where} has {str(cell)[:60]!r} in column {column!r}, which data.references names; a list of texts belongs"
            " there, or nothing",
            "correct data.references; .jsonl and .parquet files can hold lists",
        )


def _split(found: dict[str, list[Row]], data: DataSpec) -> RowSplits:
    if "train" not in found:
        raise BadInput(f"the data has no train split, only {sorted(found)}", "name it under data.path.train")
    train, made = found["train"], dict(found)
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if split not in found and train:
            train, made[split] = set_aside(train, fraction, data)
    made["train"] = train
    limited = {split: _limit(made.get(split, []), getattr(data.limit, split), data.split_seed) for split in SPLITS}
    return RowSplits(**limited)


def set_aside(rows: list[Row], fraction: float, data: DataSpec) -> tuple[list[Row], list[Row]]:
    """Rows kept and rows set aside, seeded. Rows with the same input stay together, so that nothing leaks."""
    template = Template(data.template)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(template.fill(row), []).append(row)
    keys = list(groups)
    random.Random(data.split_seed).shuffle(keys)
    wanted = max(1, round(fraction * len(rows))) if len(keys) > 1 else 0
    aside: set[str] = set()
    count = 0
    for key in keys[:-1]:  # something has to stay
        if count >= wanted:
            break
        aside.add(key)
        count += len(groups[key])
    in_order = [(template.fill(row), row) for row in rows]
    return [row for key, row in in_order if key not in aside], [row for key, row in in_order if key in aside]


def _limit(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[place] for place in chosen]
