"""Checks of a job's inputs before a search spends any time: rows, labels, model, tokens, context.

The weights of a local model folder are checked too: their shapes, and that small tensors are
finite.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.artifact import (
    CellsRecord,
    ChatRecord,
    DataRecord,
    PromptArtifact,
    VerbalizerEntry,
)
from orchestrator.artifact.peft import check_is_prompt, is_peft, read_peft
from orchestrator.data.chat import has_chat_template
from orchestrator.data.dataset import SPLITS, RowSplits, load_rows, rows_fingerprint
from orchestrator.data.demonstrations import demonstrations
from orchestrator.data.designs import BOUNDARY, Design, Designs
from orchestrator.data.encoding import (
    Encoded,
    Encoder,
    check_context,
    check_generation,
    make_encoder,
    reference_texts,
    shortened,
)
from orchestrator.data.split_checks import check_distinct_tokens, judge
from orchestrator.errors import BadInput
from orchestrator.job.metrics import choice_of, names_of
from orchestrator.job.space import (
    TrialSpec,
    draw,
    init_artifacts,
    init_texts,
    longest,
    templates,
    trial_count,
    trials,
)
from orchestrator.job.spec import BUILTIN, DataSpec, JobSpec, MethodName
from orchestrator.models.backbone.weights import check_files
from orchestrator.models.builtin import builtin_model
from orchestrator.models.source import (
    ModelSource,
    known_builtin,
    looks_like_path,
    resolve_model,
)
from orchestrator.registry import Registry
from orchestrator.search.inputs import check_can_start, left_out
from orchestrator.search.progress import Clock
from orchestrator.tuning.baselines import check_peft
from orchestrator.tuning.engine import Task
from orchestrator.tuning.generate import Decoding
from orchestrator.tuning.prompts import Method
from orchestrator.utils.wording import counted

EVALUATED = ("validation", "test")
INSTRUCTION_END = "\n"  # separates a written instruction from the input


@dataclass(frozen=True)
class Prepared:
    """A job with checked inputs: its trials, its rows and their tokens."""

    job: JobSpec
    trials: list[TrialSpec]
    """The trials known in advance; empty if trials are proposed while the search runs."""
    total: int
    """Number of trials that the search will have."""
    source: ModelSource
    rows: RowSplits
    task: Task
    instructions: list[str]
    few_shot: tuple[str, int] = ("", 0)
    """The few-shot baseline's text of answered rows, and the number of rows in it.

    The text goes in front of an input. It is empty when the context has no room for a single row.
    """
    making_s: float = 0.0  # seconds that making a built-in model took
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the result less trustworthy."""

    @property
    def parts(self) -> list[Prepared]:
        """The inputs of the likely trials of each method; these inputs for a single method."""
        if not self.job.mixes:
            return [self]
        return [self._part(method) for method in self.job.methods]

    def _part(self, method: MethodName) -> Prepared:
        likely = [spec for spec in likely_trials(self) if spec.method == method]
        task = self.task.of(method)
        return replace(self, job=self.job.of(method), trials=likely, total=len(likely), task=task)


def prepare(
    job: JobSpec,
    artifacts: Mapping[str, Path] | None = None,
    rows: RowSplits | None = None,
    *,
    begun: bool = False,
) -> Prepared:
    """Load and check the job's inputs. Raises BadInput or Unreachable.

    ``artifacts`` are the folders of the prompts that trials start from, by the reference in the
    spec. ``rows`` are the rows that ``search.inputs`` has read, if it has; otherwise they are
    loaded here. ``begun`` marks a search that is resumed: faults of the splits that would refuse a
    new search are only warned about.
    """
    for method in job.methods:
        if method in ("lora", "qlora"):
            check_peft(method)
    rows = rows or load_rows(job.data, templates(job.search.space), begun=begun)
    learns = set(job.methods) != {"prompt_design"}
    warnings = [*rows.notes, *judge(rows, job.data, job.search.metric, learns=learns, begun=begun)]
    source, making_s = _base_model(job)
    task = _task(job, rows, source, artifacts, begun=begun)
    warnings += [*_stripped(task.encoder), *_without_chat(job, source)]
    instructions, dropped_instructions = _instructions(job, task, rows, source.context_length)
    warnings += dropped_instructions
    few_shot = _few_shot(job, task, rows, source.context_length)
    if few_shot[1]:
        task.instructed[few_shot[0]] = _instructed(job, task, rows, few_shot[0])
    if job.generates:
        _prepare_generation(job, task, rows, source)
    if "prompt_design" in job.methods:
        task.designs = _designs(job, rows, source)
    return Prepared(
        found_anywhere(job, source),
        trials(job.search),
        trial_count(job.search),
        source,
        rows,
        task,
        instructions,
        few_shot,
        making_s,
        tuple(warnings),
    )


def _base_model(job: JobSpec) -> tuple[ModelSource, float]:
    """Find the base model; make it first if it is a built-in one.

    Returns the model and the seconds that making it took.
    """
    started = time.monotonic()
    if job.base_model.id.startswith(BUILTIN):
        builtin_model(known_builtin(job.base_model.id))
    making_s = time.monotonic() - started
    return resolve_model(job.base_model, weights=False), making_s


def _task(
    job: JobSpec,
    rows: RowSplits,
    source: ModelSource,
    artifacts: Mapping[str, Path] | None,
    *,
    begun: bool,
) -> Task:
    """Encode all rows, and check that they fit the base model's context."""
    encoder = make_encoder(job.data, rows, source.tokenizer(), source.family, source.table_size)
    encoder.check_template()
    splits = {split: encoder.encode(rows[split], job.data.target) for split in SPLITS}
    if not begun:
        check_distinct_tokens(
            {split: splits[split].inputs for split in SPLITS}, job.data.max_input_tokens
        )
    methods = [_method(part, encoder) for part in job.parts]
    task = Task(encoder, splits, method=methods[0], artifacts=_artifacts(job, artifacts))
    if job.mixes:
        task.methods = {method.name: method for method in methods}
    check_context(encoder, splits, longest(job.search.space), source.context_length, rows)
    return task


def _instructed(job: JobSpec, task: Task, rows: RowSplits, before: str) -> dict[str, Encoded]:
    """Encode the evaluated rows with a text in front of each input."""
    return {
        split: task.encoder.encode(rows[split], job.data.target, before=before)
        for split in EVALUATED
    }


def _stripped(encoder: Encoder) -> Iterator[str]:
    """Warn about rows in which the chat template strips white space."""
    if places := encoder.stripped_rows:
        yield (
            f"the base model's chat template strips white space at the ends of the texts of "
            f"{counted(len(places), 'row')}, for instance {places[0]}: they are tuned and served "
            "without it"
        )


def _without_chat(job: JobSpec, source: ModelSource) -> Iterator[str]:
    """Say what it means to leave a base model's chat template out."""
    if source.family == "causal" and has_chat_template(source.tokenizer()):
        yield from left_out(job)


def prepare_job(
    job: JobSpec,
    registry: Registry,
    clock: Clock,
    *,
    rows: RowSplits | None = None,
    pins: Mapping[str, str] | None = None,
    begun: bool = False,
) -> tuple[Prepared, dict[str, str]]:
    """Fetch the prompts that trials start from, then ``prepare`` the job.

    Returns the prepared job, and the version, as NAME:VERSION, that each registered reference
    resolved to. ``pins`` fixes those versions for a search that is resumed.
    """
    artifacts, versions = fetch_artifacts(job, registry, pins)
    prepared = prepare(job, artifacts, rows, begun=begun)
    clock.mark_preparation(prepared.making_s)
    return prepared, versions


def fetch_artifacts(
    job: JobSpec, registry: Registry, pins: Mapping[str, str] | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the folder of each prompt that trials start from.

    A local folder is used as it is; a registered prompt is fetched. Returns the folders by the
    reference in the spec, and the version that each registered reference resolved to.
    """
    folders, versions = {}, {}
    for reference in init_artifacts(job.search.space):
        folder = Path(reference).expanduser()
        if not folder.is_dir() and not looks_like_path(reference):
            summary = registry.resolve((pins or {}).get(reference, reference))
            folder = registry.fetch(summary.name, summary.version)
            versions[reference] = f"{summary.name}:{summary.version}"
        folders[reference] = folder
    return folders, versions


def check_registration(job: JobSpec, registry: Registry) -> None:
    """Check, before any time is spent, that the result can be registered.

    Raises BadInput or Unreachable.
    """
    registers = job.registry.register_top > 0 and not job.is_baseline
    registry.check_search_end(job.name, job.model_name if registers else None)


def _instructions(
    job: JobSpec, task: Task, rows: RowSplits, context: int
) -> tuple[list[str], tuple[str, ...]]:
    """Encode the rows behind each init text as a written instruction, and add them to the task.

    Returns the texts that fit the context together with the longest row, and a warning for each
    text that does not. Raises BadInput for a text without tokens.
    """
    instructions, warnings = [], []
    for text in init_texts(job.search.space):
        text_tokens = len(task.encoder.segment_ids([text]))
        if not text_tokens:
            raise BadInput(f"search.space.init text {text!r} has no tokens", "write some words")
        splits = _instructed(job, task, rows, text + INSTRUCTION_END)
        longest_row = max(_whole_length(job, encoded) for encoded in splits.values())
        if longest_row > context:
            warnings.append(
                f"no baseline behind search.space.init text {shortened(text)}: "
                f"its {text_tokens} tokens in front of "
                f"the longest row make {longest_row}, and the context is {context}; "
                "it starts prompts all the same"
            )
            continue
        task.instructed[text] = splits
        instructions.append(text)
    return instructions, tuple(warnings)


def _whole_length(job: JobSpec, encoded: Encoded) -> int:
    """Return the token count of the longest row with its target or longest generated text."""
    longest_row = max(encoded.lengths)
    if not job.generates:
        return longest_row
    return max(longest_row, max(map(len, encoded.inputs)) + job.max_generated_tokens)


def _designs(job: JobSpec, rows: RowSplits, source: ModelSource) -> Designs:
    """Make the written prompts of the trials, which go in front of the rows.

    Raises BadInput when an input does not fit the context, or when a trial that wants
    demonstrations has no room for a single one.
    """
    generated, context = job.max_generated_tokens if job.generates else 0, source.context_length
    designs = Designs(
        job.data, rows, source.tokenizer(), source.family, context, generated, source.table_size
    )
    for template in templates(job.search.space):
        bare = Design(template)
        designs.encoder(bare).check_template()
        check_context(
            designs.encoder(bare),
            {split: designs.encoded(bare, split) for split in EVALUATED},
            0,
            context,
        )
    for spec in trials(job.search) or draw(
        job.search.space, trial_count(job.search), job.search.seed
    ):
        if spec.method not in ("", "prompt_design"):
            continue
        if not designs.fits(Design.of(spec)):
            raise BadInput(
                f"search.space.shots {spec.shots}: the context of {context} tokens has no room "
                "for a single demonstration in front of the longest input",
                "lower data.max_input_tokens, set search.space.shots to 0, "
                "or use demonstrations: nearest",
            )
    return designs


def _few_shot(job: JobSpec, task: Task, rows: RowSplits, context: int) -> tuple[str, int]:
    """Write the few-shot baseline's text of as many answered rows as fit in front of every row.

    Returns the text and the number of rows in it.
    """
    encoder = task.encoder
    splits = [task.splits[split] for split in EVALUATED]
    answer = max(len(ids) for split in splits for ids in split.targets)
    answer = max(answer, job.max_generated_tokens) if job.generates else answer
    room = context - answer - max(len(ids) for split in splits for ids in split.inputs) - BOUNDARY
    return demonstrations(
        encoder, rows["train"], job.data.target, job.search.few_shot, job.search.seed,
        lambda text: len(encoder.input_ids(text)) <= room,
    )  # fmt: skip


def likely_trials(prepared: Prepared) -> list[TrialSpec]:
    """Return the search's trials, or draws from its space if trials are proposed as it runs."""
    search = prepared.job.search
    return prepared.trials or draw(search.space, prepared.total, search.seed)


def _method(job: JobSpec, encoder: Encoder) -> Method:
    """Return the method of a job that has only one."""
    (method,) = job.methods
    hidden = job.reparameterization.hidden_size if job.reparameterization else None
    if job.reparameterization_type == "none":
        hidden = None
    return Method(
        method, job.reparameterization_type, hidden, encoder.template.places_virtual_tokens
    )


def _artifacts(job: JobSpec, folders: Mapping[str, Path] | None) -> dict[str, dict[str, Tensor]]:
    """Load the tensors of the prompts that trials start from, by reference."""
    artifacts = {}
    for reference in init_artifacts(job.search.space):
        folder = (folders or {}).get(reference) or Path(reference)
        artifacts[reference] = stored_tensors(folder)
        for part in job.parts:
            if reference in init_artifacts(part.search.space):
                check_can_start(part, reference, artifacts[reference])
    return artifacts


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Load the named tensors of an artifact folder or of a PEFT folder.

    Raises BadInput for a folder that is neither.
    """
    check_is_prompt(folder)
    arrays = (read_peft(folder) if is_peft(folder) else PromptArtifact.load(folder)).tensors
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _prepare_generation(job: JobSpec, task: Task, rows: RowSplits, source: ModelSource) -> None:
    """Add to the task the decoding settings and the reference texts of each evaluated row.

    Raises BadInput for a masked language model, which cannot generate, and for rows that leave no
    room in the context for the generated text.
    """
    if source.family == "masked":
        raise BadInput(
            f"search.metric {job.search.metric} compares generated texts, "
            f"and base_model.id {source.id!r} is a masked language model, which fills in a blank",
            f"set search.metric to {choice_of(names_of('labels', 'targets'))}, "
            "or choose a causal or encoder-decoder model",
        )
    task.decoding = Decoding(job.max_generated_tokens, job.generation.num_beams)
    references = {split: reference_texts(rows[split], job.data) for split in EVALUATED}
    places = [
        (longest(job.search.space), task.splits),
        *((0, splits) for splits in task.instructed.values()),
    ]
    for prompt_tokens, splits in places:
        found = {split: replace(splits[split], references=references[split]) for split in EVALUATED}
        check_generation(found, prompt_tokens, source.context_length, task.decoding.max_tokens)
        splits.update(found)


def data_record(data: DataSpec, rows: RowSplits) -> DataRecord:
    """Make the record of the data that an artifact was tuned on."""
    path = data.path if isinstance(data.path, str) else data.path.model_dump_json(exclude_none=True)
    tested = rows_fingerprint(rows.test)
    return DataRecord(
        path=path, fingerprint=rows.fingerprint, rows=rows.counts, test_fingerprint=tested
    )


def chat_record(encoder: Encoder) -> ChatRecord | None:
    """Make an artifact's record of the chat template; None for a job on bare text."""
    if (chat := encoder.chat) is None:
        return None
    return ChatRecord(template_sha256=chat.digest, system=chat.system, messages=chat.column)


def cells_record(data: DataSpec) -> CellsRecord:
    """Make an artifact's record of whether empty cells are kept or refused."""
    return CellsRecord(empty="keep" if data.empty == "keep" else "refuse")


def verbalizer_entries(encoder: Encoder) -> tuple[VerbalizerEntry, ...] | None:
    """Return the encoder's verbalizer in the form that an artifact stores."""
    if (verbalizer := encoder.verbalizer) is None:
        return None
    pairs = zip(verbalizer.labels, verbalizer.texts, strict=True)
    return tuple(VerbalizerEntry(label=label, text=text) for label, text in pairs)


def found_anywhere(job: JobSpec, source: ModelSource) -> JobSpec:
    """Make the path of a local model folder absolute.

    Workers and servers have other working directories. Raises BadInput when the folder's weights
    are missing or unusable. A model of a hub is fetched and checked by the worker.
    """
    if source.id.startswith(BUILTIN) or not Path(source.id).expanduser().is_dir():
        return job
    check_files(source)
    return job.model_copy(
        update={"base_model": job.base_model.model_copy(update={"id": str(source.path)})}
    )
