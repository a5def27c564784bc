"""Everything that can be refused before anything is spent: rows, labels, model, tokens, context. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.base_model import ModelSource, resolve_model
from orchestrator.data.dataset import SPLITS, RowSplits, load_rows
from orchestrator.data.encoding import check_context, check_generation, make_encoder, reference_texts
from orchestrator.errors import BadInput
from orchestrator.space import TrialSpec, init_texts, longest, trials
from orchestrator.spec import QUICKSTART, JobSpec
from orchestrator.tuning.engine import Task
from orchestrator.tuning.generate import Decoding

EVALUATED = ("validation", "test")
INSTRUCTION_END = "\n"  # between a written instruction and the input


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are sound: its trials, its rows and their tokens."""

    job: JobSpec
    trials: list[TrialSpec]
    source: ModelSource
    rows: RowSplits
    task: Task
    instructions: list[str]


def prepare(job: JobSpec) -> Prepared:
    """Load and check the job's inputs. Raises BadInput or Unreachable."""
    rows = load_rows(job.data)
    source = resolve_model(job.base_model, weights=False)
    encoder = make_encoder(job.data, rows, source.tokenizer())
    task = Task(encoder, {split: encoder.encode(rows[split], job.data.target) for split in SPLITS})
    context = source.context_length
    check_context(encoder, task.splits, longest(job.search.space), context)
    instructions = init_texts(job.search.space)
    for text in instructions:
        if not encoder.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise BadInput(f"search.space.init text {text!r} has no tokens", "write some words")
        task.instructed[text] = {
            split: encoder.encode(rows[split], job.data.target, before=text + INSTRUCTION_END) for split in EVALUATED
        }
        check_context(encoder, task.instructed[text], 0, context)
    if job.generates:
        _prepare_generation(job, task, rows, context)
    return Prepared(_found_anywhere(job, source), trials(job.search), source, rows, task, instructions)


def _prepare_generation(job: JobSpec, task: Task, rows: RowSplits, context: int) -> None:
    """Give the task what evaluations need to generate: how, and what is right for each row that they look at."""
    task.decoding = Decoding(job.max_generated_tokens, job.generation.num_beams)
    references = {split: reference_texts(rows[split], job.data) for split in EVALUATED}
    places = [(longest(job.search.space), task.splits), *((0, splits) for splits in task.instructed.values())]
    for prompt_tokens, splits in places:
        found = {split: replace(splits[split], references=references[split]) for split in EVALUATED}
        check_generation(found, prompt_tokens, context, task.decoding.max_tokens)
        splits.update(found)


def _found_anywhere(job: JobSpec, source: ModelSource) -> JobSpec:
    """The job with a local model folder as an absolute path: workers and servers have other working directories.

    BadInput when the folder holds no weights; a hub's are fetched by the worker.
    """
    if source.id == QUICKSTART or not Path(source.id).expanduser().is_dir():
        return job
    source.weight_files()
    return job.model_copy(update={"base_model": job.base_model.model_copy(update={"id": str(source.path)})})
