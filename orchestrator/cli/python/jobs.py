"""Jobs: a job spec as a Python object, made of a file, of keyword arguments or of a mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.errors import BadInput
from orchestrator.job.spec import DataFiles, JobSpec
from orchestrator.job.yaml import load_job as load_spec
from orchestrator.job.yaml import read_values, write

if TYPE_CHECKING:
    from orchestrator.cli.python.tables import Table
    from orchestrator.search.inputs import Inputs

    Source: TypeAlias = str | os.PathLike[str] | Table
    Data: TypeAlias = Source | Mapping[str, Source]

TRAIN = "train"  # the split of a table that stands alone


class Job(JobSpec):
    """A tuning job, with the sections and keys of a job file (docs/jobs.md).

    ``Job(name=..., base_model={...}, data={...}, ...)`` takes the sections as keyword arguments,
    ``Job(document)`` takes them as a mapping; sections are mappings too. ``data["path"]`` may also
    be a data frame of pandas, a ``datasets.Dataset`` or an Arrow table, or a mapping of splits to
    these: they are written once, as parquet files below ``.orchestrator/data``.

    Raises SpecError, which lists all problems of the job.
    """

    def __init__(self, document: Mapping[str, Any] | None = None, /, **sections: Any) -> None:
        spec = read_job({**(document or {}), **sections})
        super().__init__(**{name: getattr(spec, name) for name in spec.model_fields_set})

    def to_yaml(self) -> str:
        """Return the job as the text of a job file, which ``orchestrator run`` takes."""
        return write(self.model_dump(exclude_unset=True, exclude_none=True))

    def _repr_html_(self) -> str:
        """Show the job as its YAML, in a notebook."""
        return f"<pre>{escape(self.to_yaml())}</pre>"


Job.__module__ = "orchestrator"
JobLike: TypeAlias = JobSpec | Mapping[str, Any] | str | os.PathLike[str]


def load_job(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Job:
    """Load a job from a YAML file.

    Each override has the form ``a.b.c=VALUE``, as the command line's ``--set``. Raises SpecError,
    which lists all problems, each with its line.
    """
    spec = load_spec(os.fspath(file), overrides)
    return Job.model_construct(spec.model_fields_set, **spec.__dict__)


def read_job(document: Mapping[str, Any]) -> JobSpec:
    """Make a job spec of a mapping, whose ``data.path`` may hold tables.

    Raises SpecError with all problems; no table is written for a job that has one.
    """
    data = document.get("data")
    path = data.get("path") if isinstance(data, Mapping) else None
    tables = _tables(path)
    if not tables or not isinstance(data, Mapping):
        return read_values(document)
    files = dict(path) if isinstance(path, Mapping) else {}
    named = {**files, **{split: f"{split}.parquet" for split in tables}}
    spec = read_values({**document, "data": {**data, "path": named}})
    return _with_tables(spec, tables)


def _tables(path: Any) -> dict[str, Any]:
    """Return the tables of ``data.path`` by split; a table that stands alone is for training."""
    from orchestrator.cli.python.tables import is_table

    if is_table(path):
        return {TRAIN: path}
    if not isinstance(path, Mapping):
        return {}
    return {split: source for split, source in path.items() if is_table(source)}


def _with_tables(spec: JobSpec, tables: Mapping[str, Any]) -> JobSpec:
    """Write the tables of a sound job, and name their files in its ``data.path``."""
    from orchestrator.cli.python.tables import keep_table

    data = spec.data
    assert isinstance(data.path, DataFiles)
    files = {}
    for split, table in tables.items():
        labels = data.verbalizer or {}
        file = keep_table(table, f"data.path.{split}", data.target, data.rename, labels)
        files[split] = str(file)
    path = data.path.model_copy(update=files)
    return spec.model_copy(update={"data": data.model_copy(update={"path": path})})


def checked_job(job: JobLike, data: Data | None = None) -> tuple[JobSpec, Inputs]:
    """Return the job spec that ``job`` means, and the results of checking its files and folders.

    ``data`` replaces ``data.path``. Raises BadInput or SpecError; problems of a file name its
    lines.
    """
    from orchestrator.search.inputs import check_inputs, load_checked

    if isinstance(job, str | os.PathLike) and data is None:
        return load_checked(os.fspath(job))
    spec = plain_spec(job)
    if data is not None:
        spec = with_data(spec, data)
    return spec, check_inputs(spec)


def plain_spec(job: JobLike) -> JobSpec:
    """Return a job spec, without this module's class, which workers need not import."""
    given: object = load_job(job) if isinstance(job, str | os.PathLike) else job
    if isinstance(given, JobSpec):
        return JobSpec.model_construct(given.model_fields_set, **given.__dict__)
    if isinstance(given, Mapping):
        return read_job(given)
    kind = type(given).__name__
    raise BadInput(f"the job is a {kind}", "give a Job, a mapping, or the path of a job file")


def with_data(spec: JobSpec, data: Data) -> JobSpec:
    """Return the job on other data. Raises SpecError if its settings do not go with that data."""
    document = spec.model_dump(exclude_unset=True, exclude_none=True)
    path = dict(data) if isinstance(data, Mapping) else data
    return read_job({**document, "data": {**document["data"], "path": path}})
