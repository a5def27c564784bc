"""Checks of the files and folders that a job spec names.

They run before anything heavy is imported or started. ``validate`` reports the faults with their
lines in the spec. ``run``, ``plan`` and ``submit`` make the same checks; ``run`` and ``plan`` then
use the rows that were read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.cells import is_missing
from orchestrator.data.conversations import Conversations
from orchestrator.data.dataset import (
    SPLITS,
    RowSplits,
    cut_in_two,
    known_data,
    load_rows,
    read_split,
    wanted_rows,
)
from orchestrator.data.source_row import Row, place_of
from orchestrator.data.split_checks import judge
from orchestrator.data.template import Verbalizer
from orchestrator.errors import BadInput, Problem, SpecError
from orchestrator.job.metrics import custom_function, is_custom
from orchestrator.job.space import templates
from orchestrator.job.spec import ArtifactInit, DataFiles, DataSpec, JobSpec, template_columns
from orchestrator.job.yaml import load_with_places
from orchestrator.models.builtin import check_builtin
from orchestrator.models.folder import folder_faults, names_chat_template
from orchestrator.models.source import known_builtin, looks_like_path

KEY = re.compile(r"((?:data|base_model|search)\.[a-z_]+(?:\.[a-z_]+)*)(:? )")
"""Matches the spec's key at the beginning of a message about that key."""
Files = Mapping[str, list[Row]]


class Fault(NamedTuple):
    """A fault of the file, folder or data that a key of the spec names."""

    key: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: BadInput, key: str) -> Fault:
        """Make a fault of a refusal.

        The fault's key is the key at the beginning of the message, or else ``key``.
        """
        named = KEY.match(error.message)
        return cls(named[1] if named else key, error.message, error.hint)

    @property
    def text(self) -> str:
        """The message without the key at its beginning."""
        return self.message.removeprefix(f"{self.key}: ")


class Unchecked(NamedTuple):
    """An input that can't be checked because it is not on this machine, or not yet."""

    key: str
    reason: str


@dataclass(frozen=True)
class Inputs:
    """The results of checking the files and folders of a job."""

    faults: tuple[Fault, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    rows: RowSplits | None = None
    """The rows, if they were read from files and are sound."""
    warnings: tuple[str, ...] = ()
    """Sentences on what would make the result less trustworthy."""
    seconds: float = 0.0
    """Seconds that the checks took."""


def load_checked(
    path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False
) -> tuple[JobSpec, Inputs]:
    """Read a job spec and check the files and folders that it names.

    With ``elsewhere``, the job will run on a cluster: an absolute path that this machine lacks is
    taken for a path of the cluster and is not checked. Raises SpecError with every problem and its
    line.
    """
    job, places = load_with_places(path, overrides)
    inputs = examine(job, elsewhere=elsewhere)
    if inputs.faults:
        problems = [places.problem(fault.key, fault.text, fault.hint) for fault in inputs.faults]
        raise SpecError(places.in_order(problems))
    return job, inputs


def check_inputs(job: JobSpec) -> Inputs:
    """Check the files and folders that a job names.

    Raises BadInput; several faults are listed with one line for each.
    """
    inputs = examine(job)
    if len(inputs.faults) == 1:
        raise BadInput(inputs.faults[0].message, inputs.faults[0].hint)
    if inputs.faults:
        faults = inputs.faults
        raise SpecError([Problem(job.name, None, it.key, it.text, it.hint) for it in faults])
    return inputs


def examine(job: JobSpec, *, elsewhere: bool = False) -> Inputs:
    """Find all that is wrong with the files and folders of a job, and what can't be checked."""
    started = time.monotonic()
    findings = [
        *_model_findings(job, elsewhere),
        *_artifact_findings(job, elsewhere),
        *_metric_findings(job, elsewhere),
    ]
    faults = [finding for finding in findings if isinstance(finding, Fault)]
    unchecked = [finding for finding in findings if isinstance(finding, Unchecked)]
    rows = None
    warnings: tuple[str, ...] = ()
    if job.data.source == "files":
        data_faults, missing, rows = _examine_files(job, elsewhere)
        faults += data_faults
        unchecked += missing
    else:
        faults += _named_data_faults(job.data)
        unchecked.append(Unchecked("data.path", f"{job.data.path} {NOT_HERE[job.data.source]}"))
    if rows is not None and not faults:
        try:
            learns = set(job.methods) != {"prompt_design"}
            found = judge(rows, job.data, job.search.metric, learns=learns)
            warnings = (*rows.notes, *found)
        except BadInput as error:
            faults.append(Fault.of(error, "data"))
    has_template = names_chat_template(job.base_model)
    if has_template:
        warnings += tuple(left_out(job))
    elif has_template is False and job.data.uses_chat:
        faults.append(_without_chat_template(job))
    seconds = time.monotonic() - started
    return Inputs(tuple(faults), tuple(unchecked), rows, warnings, seconds)


NOT_HERE = {
    "builtin": "is made on the spot when it is needed",
    "hub": "is fetched from the hub, or its cache, when it is needed",
}


def _is_elsewhere(path: str, elsewhere: bool) -> bool:
    whole = Path(path).expanduser()
    return elsewhere and whole.is_absolute() and not whole.exists()


def _on_cluster(key: str, path: str) -> Unchecked:
    return Unchecked(key, f"{path} is not on this machine: the cluster has to have it")


# The base model


def _model_findings(job: JobSpec, elsewhere: bool) -> Iterator[Fault | Unchecked]:
    base = job.base_model
    key = "base_model.id"
    if base.source == "builtin":
        try:
            name = known_builtin(base.id)
            if not elsewhere:
                check_builtin(name)
            yield Unchecked(key, f"{base.id} {NOT_HERE['builtin']}")
        except BadInput as error:
            yield Fault.of(error, key)
    elif base.source == "hub" and not Path(base.id).expanduser().exists():
        yield Unchecked(key, f"{base.id} {NOT_HERE['hub']}")
    elif _is_elsewhere(base.id, elsewhere):
        yield _on_cluster(key, base.id)
    else:
        yield from (Fault.of(error, key) for error in folder_faults(base))
        if base.source == "hub" and base.revision != type(base)(id=base.id).revision:
            message = f"base_model.revision has no effect: base_model.id {base.id} is a folder here"
            hint = "leave it out, or run where there is no such folder"
            yield Fault("base_model.revision", message, hint)


def left_out(job: JobSpec) -> Iterator[str]:
    """Say what a job means that leaves out its base model's chat template."""
    if job.data.uses_chat or "chat" in job.data.model_fields_set:
        return
    yield (
        f"{job.base_model.id} has a chat template, and data.chat is not set: prompts are tuned on "
        "bare text, and /v1/chat/completions serves them bare for a single message, but in the "
        "chat template, which they never saw, for several. Set data.chat: true to tune them in "
        "it, or data.chat: false to leave it out"
    )


def _without_chat_template(job: JobSpec) -> Fault:
    key = "data.chat" if job.data.messages is None else "data.messages"
    return Fault(
        key,
        f"{key}: base_model.id {job.base_model.id!r} has no chat template",
        "leave it out, or choose a base model with a chat template (often named -Instruct or "
        "-Chat)",
    )


# Prompts that trials start from


def _artifact_findings(job: JobSpec, elsewhere: bool) -> Iterator[Fault | Unchecked]:
    found: set[Fault | Unchecked] = set()  # a shared init is that of several methods
    for part in job.parts:
        (method,) = part.methods
        for finding in _part_findings(part, job.written_at(method, "search.space.init"), elsewhere):
            if finding not in found:
                found.add(finding)
                yield finding


def _part_findings(job: JobSpec, key: str, elsewhere: bool) -> Iterator[Fault | Unchecked]:
    """Check the prompts that a job of one method starts from, which ``key`` names."""
    init = job.search.space.init
    inits = init if isinstance(init, list) else [init]
    for number, each in enumerate(inits):
        if not isinstance(each, ArtifactInit):
            continue
        place = f"[{number}]" if isinstance(init, list) else ""
        where = f"{key}{place}.artifact"
        folder = Path(each.artifact).expanduser()
        if not folder.is_dir() and not looks_like_path(each.artifact):
            reason = f"{each.artifact} is fetched from the registry when it is needed"
            yield Unchecked(where, reason)
        elif _is_elsewhere(each.artifact, elsewhere):
            yield _on_cluster(where, each.artifact)
        else:
            yield from _folder_faults(job, where, each.artifact, folder)


def _folder_faults(job: JobSpec, key: str, reference: str, folder: Path) -> Iterator[Fault]:
    from orchestrator.artifact import PromptArtifact
    from orchestrator.artifact.peft import is_peft, read_peft

    try:
        stored = read_peft(folder) if is_peft(folder) else PromptArtifact.load(folder)
        check_can_start(job, reference, stored.tensors)
    except BadInput as error:
        yield Fault(key, error.message, error.hint)


def check_can_start(job: JobSpec, reference: str, tensors: Mapping[str, object]) -> None:
    """Raise BadInput if a soft prompt is to start from a prefix, which has no embeddings."""
    if job.method != "prefix_tuning" and "prompt" not in tensors:
        raise BadInput(
            f"search.space.init artifact {reference!r} is a prefix "
            f"and can't start {job.method_names}",
            "choose a prompt of prompt_tuning or p_tuning, or set method prefix_tuning",
        )


# A metric of the user's own


def _metric_findings(job: JobSpec, elsewhere: bool) -> Iterator[Fault | Unchecked]:
    """Import the function that the search ranks by; a module may be on the cluster only."""
    name = job.search.metric
    if not is_custom(name):
        return
    module = name.partition(":")[0]
    if elsewhere and not _is_here(module):
        reason = f"{module} is not on this machine: every worker has to be able to import it"
        yield Unchecked("search.metric", reason)
        return
    try:
        custom_function(name)
    except BadInput as error:
        yield Fault.of(error, "search.metric")


def _is_here(module: str) -> bool:
    """Tell whether a module's outermost package can be found; nothing is imported."""
    return find_spec(module.partition(".")[0]) is not None


# Rows


def _named_data_faults(data: DataSpec) -> Iterator[Fault]:
    try:
        known_data(str(data.path))
    except BadInput as error:
        yield Fault.of(error, "data.path")


def _examine_files(
    job: JobSpec, elsewhere: bool
) -> tuple[list[Fault], list[Unchecked], RowSplits | None]:
    """Read and check the files; the rows come back where all of them are here and sound."""
    data = job.data
    faults: list[Fault] = []
    unchecked: list[Unchecked] = []
    files: dict[str, list[Row]] = {}
    assert isinstance(data.path, DataFiles)
    for split, path in data.path:
        if path is None:
            continue
        if _is_elsewhere(path, elsewhere):
            unchecked.append(_on_cluster(f"data.path.{split}", path))
            continue
        try:
            files[split] = read_split(data, split)
        except BadInput as error:
            faults.append(Fault.of(error, f"data.path.{split}"))
    complete = not faults and not unchecked
    found, rows = _examine_rows(job, files, complete)
    return faults + found, unchecked, rows


def _examine_rows(
    job: JobSpec, files: Files, complete: bool
) -> tuple[list[Fault], RowSplits | None]:
    """Check the columns and labels of all rows, and the splits too if the set is ``complete``."""
    data = job.data
    try:
        wanted = wanted_rows(files, data) if any(files.values()) else dict(files)
    except BadInput as error:
        return [Fault.of(error, "data.where" if data.where else "data.path")], None
    try:
        shaped = _shaped(wanted, data)
    except BadInput as error:
        return [Fault.of(error, _shaping_key(data))], None
    if faults := list(_column_faults(job, shaped)):
        return faults, None
    faults = list(_label_faults(data, shaped))
    if not complete:
        return faults, None
    try:
        return faults, load_rows(data, templates(job.search.space), files)
    except BadInput as error:
        return [*faults, Fault.of(error, "data.path")], None


def _shaped(files: Files, data: DataSpec) -> Files:
    """Cut conversations into prompt and completion, and texts in two for ``data.prefix_lm``."""
    if data.prefix_lm is None:
        conversations = Conversations(data)
        return {split: list(conversations.read(rows, split)) for split, rows in files.items()}
    column, seed = data.prefix_lm, data.split_seed
    return {split: list(cut_in_two(rows, column, seed)) for split, rows in files.items()}


def _shaping_key(data: DataSpec) -> str:
    """Name the setting that says how rows are cut into input and answer."""
    if data.prefix_lm is not None:
        return "data.prefix_lm"
    return "data.template" if data.messages is None else "data.messages"


def _column_faults(job: JobSpec, files: Files) -> Iterator[Fault]:
    """Find the columns that a row lacks; each column is reported once."""
    for column, key in _named_columns(job).items():
        lacking = _first_without(files, column, job.data)
        if lacking is None:
            continue
        place, row = lacking
        written = key.removeprefix("data.") in (*job.data.model_fields_set, key)
        what = f"{key} names" if written else f"{key} is missing: rows without one need"
        message = f"{what} column {column!r}, which {place} lacks; it has {sorted(row)}"
        yield Fault(key, message, f"correct {key}, or map the column with data.rename")


def _named_columns(job: JobSpec) -> dict[str, str]:
    """Map each column that the spec names to the key that names it first."""
    data = job.data
    named = dict.fromkeys(template_columns(data.template), "data.template")
    for template in templates(job.search.space):
        for column in template_columns(template):
            named.setdefault(column, "search.space.template")
    named.setdefault(data.target, "data.target")
    if data.references is not None:
        named.setdefault(data.references, "data.references")
    return named


def _old_names(column: str, data: DataSpec) -> set[str]:
    """Return the names that the column may have in a row."""
    return {column, *(old for old, new in data.rename.items() if new == column)}


def _first_without(files: Files, column: str, data: DataSpec) -> tuple[str, Row] | None:
    """Find the first row that lacks the column, with its place for a message."""
    names = _old_names(column, data)
    for split in SPLITS:
        for number, row in enumerate(files.get(split, ()), start=1):
            if names.isdisjoint(row):
                knows_place = bool(getattr(row, "number", 0))
                return place_of(row, split) if knows_place else f"row {number} of {split}", row
    return None


def _label_faults(data: DataSpec, files: Files) -> Iterator[Fault]:
    """Find labels that the verbalizer lacks."""
    if data.verbalizer is None:
        return
    names = [*(_old_names(data.target, data) - {data.target}), data.target]
    cells = (_cell(row, names) for rows in files.values() for row in rows)
    try:
        Verbalizer.covering(data.verbalizer, (cell for cell in cells if not is_missing(cell)))
    except BadInput as error:
        yield Fault.of(error, "data.verbalizer")


def _cell(row: Row, names: Sequence[str]) -> Any:
    """Return the cell of a column that may have several names, of which the first counts."""
    return next((row[name] for name in names if name in row), None)
