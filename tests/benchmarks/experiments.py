"""Train all trials of a job file in one process, for docs/experiments.md.

``python -m tests.benchmarks.experiments jobs/init-ablation.yaml --by init
    [--set KEY=VALUE ...] [--out build/x.json]``

There is no Ray, MLflow or early stopping: every trial runs all its steps, trials packed as in a
search. A trial is judged as in a search: its best prompt by validation is evaluated on the test
rows, and on the rows of other files with ``--also NAME=FILE``.

Lines are means over the trials with equal values of the keys in ``--by``, with the standard
deviation. If the space lists several learning rates and ``--by`` does not name them, each seed's
best trial by validation is used.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch: sets how OpenMP threads wait

# isort: split
import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from orchestrator.cli.workbench.domain_shift import majority
from orchestrator.data.dataset import RowSplits, load_rows, load_split
from orchestrator.data.source_row import Row
from orchestrator.job.space import templates
from orchestrator.job.spec import DataFiles, DataSpec, JobSpec, RowLimits
from orchestrator.job.spec.base import Label
from orchestrator.job.yaml import load_job
from orchestrator.models.backbone import PromptTensors, default_device, load_backbone, set_threads
from orchestrator.models.scoring import answer_scores
from orchestrator.models.source import resolve_model
from orchestrator.search.prepare import Prepared, likely_trials, prepare
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.reports import EvaluationJob

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class OtherRows:
    """A further file with rows to evaluate, or only rows with these values, at most ``limit``."""

    file: str
    where: dict[str, Label] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class MoreRows(RowSplits):
    """A job's rows and others, which written prompts are put in front of as well."""

    others: dict[str, list[Row]] = field(default_factory=dict)

    def __getitem__(self, split: str) -> list[Row]:
        return self.others[split] if split in self.others else super().__getitem__(split)


@dataclass(frozen=True)
class Trial:
    """A configuration, and the metrics of its best prompt on each split."""

    config: dict[str, Any]
    steps: int
    metrics: dict[str, dict[str, float]]
    checkpoint: bytes = b""


@dataclass
class Experiment:
    """The trials of a job, the metrics of the model without tuning, and the time taken."""

    job: JobSpec
    trials: list[Trial]
    untuned: dict[str, dict[str, dict[str, float]]]
    parameters: int
    seconds: float
    also: list[str] = field(default_factory=list)
    voted: float | None = None
    """Test accuracy of the majority of all trials' prompts, with ``--vote``."""

    def document(self) -> dict[str, Any]:
        return {
            "job": self.job.name,
            "base_model": self.job.base_model.id,
            "parameters": self.parameters,
            "metric": self.job.search.metric,
            "steps": self.job.train.steps,
            "untuned": self.untuned,
            "trials": [
                {"config": it.config, "steps": it.steps, "metrics": it.metrics}
                for it in self.trials
            ],
            "voted": self.voted,
            "seconds": round(self.seconds, 1),
        }


@dataclass
class Line:
    """A line of the table: the values of equal configurations, one for each seed."""

    label: str
    values: list[float]
    rates: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def run_experiment(
    job: JobSpec,
    capacity: int = 4,
    vote: bool = False,
    also: Mapping[str, OtherRows] = MappingProxyType({}),
    untuned: bool = True,
) -> Experiment:
    """Train every trial to its end, ``capacity`` trials at a time.

    With ``vote``, the accuracy of the majority of all trials' prompts is computed too. ``also`` has
    further rows to evaluate, by the names to show. Without ``untuned``, the model is not evaluated
    without tuning.

    Raises OrchestratorError as ``run`` would.
    """
    started = time.monotonic()
    rows = load_rows(job.data, templates(job.search.space))
    others = {name: load_split(_data_of(job, other), "test") for name, other in also.items()}
    more = MoreRows(rows.train, rows.validation, rows.test, rows.notes, others)
    prepared = prepare(job, rows=more)
    for name, found in others.items():
        prepared.task.splits[name] = prepared.task.encoder.encode(found, job.data.target)
    backbone = load_backbone(resolve_model(job.base_model), default_device(), job.base_model.dtype)
    engine = make_engine(backbone, prepared.task, job.train, job.search, capacity)
    asked = _asked(prepared) if untuned else ()
    baselines = {name: _evaluated(engine, text) for name, text in asked}
    judged = ["test", *also]
    trials = [
        trial
        for pack in _packs(prepared, engine.capacity)
        for trial in _trained(engine, pack, judged)
    ]
    weights = sum(weight.numel() for weight in backbone.model.parameters())
    voted = _vote(engine, trials) if vote else None
    return Experiment(job, trials, baselines, weights, time.monotonic() - started, [*also], voted)


def _data_of(job: JobSpec, other: OtherRows) -> DataSpec:
    """Return the job's data section with the other rows as its test rows."""
    files = DataFiles(train=other.file, test=other.file)
    limit = RowLimits(test=other.limit)
    changes = {"path": files, "limit": limit, "where": other.where}
    return job.data.model_copy(update=changes)


def _asked(prepared: Prepared) -> Iterator[tuple[str, str | None]]:
    yield "no prompt", None
    shown, examples = prepared.few_shot
    if examples:
        yield f"{examples} examples", shown
    for text in prepared.instructions:
        yield f"written: {text}", text


def _evaluated(engine: Engine, text: str | None) -> dict[str, dict[str, float]]:
    return {split: engine.evaluate(EvaluationJob(split, instruction=text)) for split in SPLITS}


def _packs(prepared: Prepared, capacity: int) -> Iterator[list[Any]]:
    """Yield trials of similar length together.

    A pack is as slow as its longest prompt.
    """
    trials = sorted(likely_trials(prepared), key=lambda trial: trial.num_virtual_tokens)
    for start in range(0, len(trials), capacity):
        yield trials[start : start + capacity]


def _trained(engine: Engine, pack: Sequence[Any], judged: Sequence[str]) -> list[Trial]:
    names = {f"t{place}": spec for place, spec in enumerate(pack)}
    for name, spec in names.items():
        engine.seat(name, spec)
    last = {}
    while engine.slots:
        for report in engine.round():
            last[report.trial] = report
    found = []
    for name, spec in names.items():
        report = last[name]
        if not report.best_metrics:  # broken before its first evaluation
            continue
        metrics = {"validation": report.best_metrics}
        for split in judged:
            metrics[split] = engine.evaluate(EvaluationJob(split, report.checkpoint, spec=spec))
        found.append(Trial(spec.config(), report.step, metrics, report.checkpoint))
    return found


@torch.inference_mode()
def _vote(engine: Engine, trials: Sequence[Trial]) -> float:
    """Return the test accuracy of the label that most prompts find likeliest.

    The count is that of ``orchestrator evaluate --ensemble``.
    """
    task, backbone = engine.task, engine.backbone
    split, answers = task.splits["test"], task.encoder.scored_answers
    states = [Checkpoint.from_bytes(trial.checkpoint) for trial in trials]
    prepared = backbone.prepare(
        [PromptTensors.from_named(state.best(), task.method.inside) for state in states]
    )
    owner, right = list(range(len(trials))), 0
    for row, ids in enumerate(split.inputs):
        scores = answer_scores(
            backbone, prepared, [ids] * len(trials), owner, [answers] * len(trials)
        )
        said = [dict(enumerate(one.softmax(0).tolist())) for one in scores]
        right += majority(said, range(len(answers))) == split.labels[row]
    return right / len(split)


def lines(experiment: Experiment, by: Sequence[str], split: str = "test") -> list[Line]:
    """Return a line for each combination of the keys in ``by``, in the order of the space."""
    metric, sign = (
        experiment.job.search.metric,
        1.0 if experiment.job.search.better == "max" else -1.0,
    )
    groups: dict[str, dict[int, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in experiment.trials:
        label = ", ".join(_shown(trial.config[name]) for name in by) or "all"
        groups[label][trial.config["seed"]].append(trial)
    made = []
    for label, seeds in groups.items():
        best = [
            max(of, key=lambda it: sign * it.metrics["validation"][metric]) for of in seeds.values()
        ]
        rates = [it.config["learning_rate"] for it in best if "learning_rate" in it.config]
        made.append(Line(label, [it.metrics[split][metric] for it in best], rates))
    return made


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        ((kind, what),) = value.items()
        return f"{kind}: {what}"
    return str(value)


def table(experiment: Experiment, by: Sequence[str]) -> Iterator[str]:
    """Yield the table of docs/experiments.md.

    It has the test metric's mean and standard deviation over seeds, and each seed's value.
    """
    job, metric = experiment.job, experiment.job.search.metric
    size = f"{experiment.parameters:,} weights"
    yield f"{job.name}: {job.base_model.id} ({size}), test {metric}, {experiment.seconds:.0f} s"
    for name, found in experiment.untuned.items():
        yield f"| {name} | {found['test'][metric]:.3f} | | |"
    for split in ("test", *experiment.also):
        for line in lines(experiment, by, split):
            label = line.label if split == "test" else f"{line.label}, {split}"
            values = ", ".join(f"{value:.3f}" for value in line.values)
            rates = ", ".join(f"{rate:g}" for rate in line.rates)
            yield f"| {label} | {line.mean:.3f} ± {line.spread:.3f} | {values} | {rates} |"
    if experiment.voted is not None:
        yield f"| majority of all | {experiment.voted:.3f} | | |"


def main(arguments: Sequence[str]) -> int:
    """Run the job and print its table."""
    args = parser().parse_args(arguments)
    set_threads(args.threads)
    named = dict(pair.split("=", 1) for pair in args.also)
    also = {name: OtherRows(file) for name, file in named.items()}
    experiment = run_experiment(load_job(args.job, args.set), args.capacity, args.vote, also)
    print("\n".join(table(experiment, args.by)), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(experiment.document(), indent=2) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.experiments", description=__doc__
    )
    made.add_argument("job", type=Path)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument(
        "--by",
        action="append",
        default=[],
        help="init, num_virtual_tokens, learning_rate; repeatable",
    )
    made.add_argument(
        "--also", action="append", default=[], metavar="NAME=FILE", help="further rows to evaluate"
    )
    made.add_argument(
        "--vote", action="store_true", help="also the majority of all trials, by accuracy"
    )
    made.add_argument("--capacity", type=int, default=4, help="trials at a time (default 4)")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, help="also write all trials as JSON")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
