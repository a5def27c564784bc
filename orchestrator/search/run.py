"""The pipeline that takes a tuning job from its spec to a registered model.

It prepares the inputs, runs the search, compares the best trial with the baselines, registers the
result and promotes it with an alias.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator import __version__
from orchestrator.artifact import (
    SOFT,
    BaseModelRecord,
    GenerationRecord,
    Manifest,
    PromptArtifact,
    ReparameterizationRecord,
)
from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.ray_folder import ray_temp_note
from orchestrator.cluster.session import ray_beside
from orchestrator.data.designs import Design
from orchestrator.errors import (
    BadInput,
    Interrupted,
    JobFailed,
    NothingFound,
    SearchLost,
    Unreachable,
)
from orchestrator.job.space import TrialSpec, init_artifacts, no_result, why_fewer_trials
from orchestrator.job.spec import JobSpec
from orchestrator.models.nearest_words import nearest_words
from orchestrator.models.source import BaseModelInfo, looks_like_path
from orchestrator.registry import Registry, SearchLog
from orchestrator.search.inputs import Inputs, check_inputs
from orchestrator.search.mlflow_tags import outcome_tags, search_note, search_tags
from orchestrator.search.plan.plan import Plan, device_hours, make_plan
from orchestrator.search.prepare import (
    Prepared,
    cells_record,
    chat_record,
    data_record,
    prepare,
    verbalizer_entries,
)
from orchestrator.search.report import read_facts, write_report
from orchestrator.search.state.folder import SearchFolder, check_home
from orchestrator.search.state.history import History
from orchestrator.search.state.journal import Journal, read_history
from orchestrator.search.state.processes import save_processes
from orchestrator.search.state.recorder import Recorder
from orchestrator.search.state.saved import SavedSearch, load_saved, refuse_changes
from orchestrator.search.state.trials import Outcome, TrialRecord
from orchestrator.search.study.study import Listener, trial_id
from orchestrator.search.tracking import BASELINES, SPLITS, MlflowMirror
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.prestart import make_ready
from orchestrator.search.workers.running import Running, placed, running
from orchestrator.tuning.reports import EvaluationJob, confusion_counts, without_confusion
from orchestrator.utils.atomic import write_whole
from orchestrator.utils.interrupts import nothing_to_interrupt, whole

Metrics = dict[str, float]
BASE_MODEL = "base_model"
RESTARTS = 3  # times that a search restarts after its broker or a Train controller was lost
SOON_S = 10.0  # the wait for MLflow before the user is told about it
REGISTRY_PATIENCE_S = 600.0
"""Longest wait of a completed search for MLflow, in seconds.

Nothing is lost when the wait runs out: `resume` registers the result later.
"""


class Progress(Listener, Protocol):
    """The progress display of the command line.

    ``stage`` names the step that the job is at outside its trials. ``note`` shows a remark.
    ``trials`` returns a context that shows the trials while they run.
    """

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def trials(
        self, trials: Sequence[tuple[str, TrialSpec]], total: int, history: History
    ) -> AbstractContextManager[None]: ...


@dataclass
class Clock:
    """The time that a job spends on each of its steps."""

    started: float = field(default_factory=time.monotonic)
    marks: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def after(cls, seconds: float) -> Clock:
        """Make a clock that was started ``seconds`` ago."""
        started = time.monotonic() - seconds
        return cls(started=started, last=started)

    def mark(self, name: str, until: float | None = None) -> None:
        """Book the time since the last mark, up to ``until`` or to now, under ``name``."""
        moment = time.monotonic() if until is None else until
        self.marks[name] = round(self.marks.get(name, 0.0) + moment - self.last, 3)
        self.last = moment

    def before(self) -> float:
        """Return the seconds until Ray was up.

        The time to make a built-in model is left out, since a model is made only once.
        """
        return self.marks.get("prepare", 0.0) + self.marks.get("ray", 0.0)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each mark, with the totals that ``run --json`` prints."""
        startup = sum(self.marks.get(name, 0.0) for name in ("model", "prepare", "ray", "workers"))
        return {
            "total": round(time.monotonic() - self.started, 3),
            "startup": round(startup, 3),
            "training": self.marks.get("trials", 0.0),
            **self.marks,
        }


def run_job(
    job: JobSpec,
    progress: Progress,
    address: str | None = None,
    verbose: bool = False,
    planned: bool = False,
    folder: SearchFolder | None = None,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Run the job and return the document of ``run --json``.

    ``planned`` measures the job first and keeps the estimate beside the outcome. ``folder`` is
    where the search is kept; a new folder is made unless one is given. ``inputs`` is the result of
    checking the job's files; they are checked here unless it is given.

    Raises OrchestratorError, and leaves nothing half-made behind. An interrupt raises Interrupted
    once there is a search that can be resumed.
    """
    inputs = inputs or check_inputs(job)  # first, since starting and stopping Ray takes seconds
    clock = Clock.after(inputs.seconds)
    registry = Registry()
    check_home()
    with ray_beside(address, verbose, then=make_ready) as ray_up:
        registry.check()
        check_search_end(job, registry)
        progress.stage("reading data and base model")
        artifacts, pins = find_artifacts(job, registry)
        prepared = prepare(job, artifacts, inputs.rows)
        note_warnings(prepared, progress)
        clock.mark("model", until=clock.last + prepared.making_s)
        clock.mark("prepare")
        progress.stage("starting Ray")
        ours = ray_up()
        if ours and (note := ray_temp_note()):
            progress.note(note)
        clock.mark("ray")
        placement = placed(prepared)
        folder = folder or SearchFolder.new(job.name)
        with folder.locked(), going_on(folder):
            return Pipeline(prepared, registry, progress, clock, folder, pins, planned=planned).run(
                placement, ours
            )


def plan_job(
    job: JobSpec,
    say: Callable[[str], None],
    address: str | None = None,
    verbose: bool = False,
    inputs: Inputs | None = None,
) -> Plan:
    """Estimate the time and memory that the job will take, and keep nothing.

    A cluster is only asked for its nodes. Steps and evaluations are measured on this machine. The
    start of the search is rehearsed only if the search would run on this machine.

    Raises OrchestratorError; it is BadInput for a job that ``run_job`` would refuse.
    """
    inputs = inputs or check_inputs(job)
    clock = Clock.after(inputs.seconds)
    elsewhere = bool(address or os.environ.get("RAY_ADDRESS"))
    with (
        ray_beside(address, verbose, make_ready) as ray_up,
        tempfile.TemporaryDirectory(prefix="plan-") as folder,
    ):
        say("reading data and base model")
        artifacts, _ = find_artifacts(job, Registry())
        prepared = prepare(job, artifacts, inputs.rows)
        clock.mark("model", until=clock.last + prepared.making_s)
        clock.mark("prepare")
        say("asking the cluster for its nodes" if elsewhere else "starting Ray")
        ray_up()
        clock.mark("ray")
        placement = placed(prepared)
        say("measuring the start, steps and evaluations")
        return make_plan(
            prepared, placement, nodes(), clock.before(), None if elsewhere else Path(folder)
        )


def note_warnings(prepared: Prepared, progress: Progress) -> None:
    """Show the warnings about what makes the result less trustworthy."""
    for warning in prepared.warnings:
        progress.note(f"warning: {warning}")


def check_search_end(job: JobSpec, registry: Registry) -> None:
    """Check, before any time is spent, that the result can be registered.

    Raises BadInput or Unreachable.
    """
    registers = job.registry.register_top > 0 and not job.is_baseline
    registry.check_search_end(job.name, job.model_name if registers else None)


@contextmanager
def kept_for_resume(folder: SearchFolder) -> Iterator[None]:
    """Add to a refusal of the registry that the search is kept and can be registered later.

    The block that this context encloses is the registration.
    """
    try:
        yield
    except BadInput as error:
        resume = f"orchestrator resume {folder.id}, which registers what the search found"
        raise BadInput(
            error.message, f"{error.hint}; then {resume}" if error.hint else resume
        ) from None


def find_artifacts(
    job: JobSpec, registry: Registry, pins: Mapping[str, str] | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the folder of each prompt that trials start from.

    A local folder is used as it is; a registered prompt is fetched. Returns the folders by the
    reference in the spec, and the version, as NAME:VERSION, that each registered reference resolved
    to. ``pins`` fixes those versions for a search that is resumed.
    """
    found, used = {}, {}
    for reference in init_artifacts(job.search.space):
        folder = Path(reference).expanduser()
        if not folder.is_dir() and not looks_like_path(reference):
            summary = registry.resolve((pins or {}).get(reference, reference))
            folder = registry.fetch(summary.name, summary.version)
            used[reference] = f"{summary.name}:{summary.version}"
        found[reference] = folder
    return found, used


@contextmanager
def going_on(folder: SearchFolder) -> Iterator[None]:
    """Add the command that resumes the search to whatever ends it early.

    The command is added only once the folder holds a search that can be resumed.
    """
    resume = f"orchestrator resume {folder.id}"
    try:
        yield
    except KeyboardInterrupt as error:
        if folder.description.is_file():
            raise Interrupted(_with_notes("interrupted", error), resume) from None
        raise
    except NothingFound:
        raise
    except (Unreachable, JobFailed) as error:
        if folder.description.is_file():
            raise type(error)(
                _with_notes(error.message, error), f"{error.hint}; then {resume}"
            ) from None
        raise


def _with_notes(message: str, error: BaseException) -> str:
    """Append to the message the notes on what else went wrong while the search ended."""
    notes = (note.splitlines()[0] for note in getattr(error, "__notes__", ()) if note)
    return "; ".join([message, *notes])


class Pipeline:
    """The parts of one job that need the cluster."""

    def __init__(
        self,
        prepared: Prepared,
        registry: Registry,
        progress: Progress,
        clock: Clock,
        folder: SearchFolder,
        pins: Mapping[str, str],
        saved: SavedSearch | None = None,
        history: History | None = None,
        planned: bool = False,
    ) -> None:
        """Set up the pipeline of a new search, or of a resumed one.

        ``saved`` and ``history`` belong to a resumed search. ``planned`` measures the job first.
        """
        self.planned = planned
        self.plan: Plan | None = None
        self.job = prepared.job
        self.prepared = prepared
        self.registry = registry
        self.progress = progress
        self.clock = clock
        self.folder = folder
        self.id = folder.id
        self.pins = pins
        self.saved = saved
        self.history = history or History()
        self.trials = [(trial_id(number), spec) for number, spec in enumerate(prepared.trials)]

    def run(self, placement: Placement, ours: bool) -> dict[str, Any]:
        """Search, compare with the baselines, register, and return the document of the result.

        ``ours`` is true when Ray was started by this search and for it alone.
        """
        if self.planned:
            self.progress.stage("measuring the start, steps and evaluations")
            storage = self.folder.ray / "rehearsal"
            self.plan = make_plan(self.prepared, placement, nodes(), self.clock.before(), storage)
            self.clock.mark("plan")
        if ours:
            save_processes(self.folder.processes)
        for left in reversed(range(RESTARTS + 1)):
            try:
                document = self._attempt(placement, ours)
                break
            except SearchLost as error:
                if not left or not self.folder.description.is_file():
                    raise
                self.progress.note(f"{error.message}; going on from what was kept")
                self.saved, self.history = load_saved(self.folder)[0], read_history(self.folder)
                shutil.rmtree(self.folder.ray, ignore_errors=True)
        try:
            write_whole(self.folder.result, json.dumps(document, default=str).encode())
        except OSError as error:
            self.progress.note(
                f"the result can't be kept in {self.folder.result} ({error.strerror})"
            )
        self.folder.processes.unlink(missing_ok=True)
        self._report()
        nothing_to_interrupt()
        return document

    def _attempt(self, placement: Placement, ours: bool) -> dict[str, Any]:
        """Run the search from its current state until it is done.

        Raises SearchLost when its broker or a Train controller was lost.
        """
        workers = partial(running, self.prepared, placement, self.folder.ray)
        # The MLflow run is opened first, so that MLflow refuses before any worker is started. The
        # inner context closes it before the workers are stopped, since stopping them takes longer
        # than the grace period of SIGTERM. The outer context closes it if no worker can start.
        with whole(self._log) as log, whole(workers) as search, whole(lambda: log):
            self._check_base_model(search, log)
            if self.saved is None:
                saved = SavedSearch.of(
                    self.prepared, self.pins, self.registry.display_uri, log.run_id
                )
                saved.save(self.folder, self.job)
            copying, tags = self.job.search.scheduler == "pbt", search_tags(self.prepared, self.id)
            mirror = MlflowMirror(log, copying, tags)
            mirror.restore(self.history)
            journal = Journal(
                self.folder, self.history, self.job.perturbation_steps if copying else None
            )
            recording = partial(Recorder, journal, self.history, mirror.write, self.progress.note)
            with whole(recording) as recorder:
                if ours:
                    # Save them again: Ray starts its agents a little later.
                    save_processes(self.folder.processes)
                return self._search(search, log, recorder)

    def _report(self) -> None:
        """Write the report to the search's folder and MLflow run.

        A report that fails is only noted, since the search's result is already safe.
        """
        self.progress.stage("drawing the report")
        try:
            write_report(read_facts(self.folder), self.folder.report, self.registry)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.progress.note(f"no report: {text}; again with orchestrator report {self.id}")

    def _check_base_model(self, search: Running, log: SearchLog) -> None:
        """Refuse to resume a search on other base model weights than it began with.

        Raises BadInput, and marks the search's MLflow run as killed.
        """
        if known := self.history.found(BASE_MODEL):
            found = search.ready().fingerprint
            try:
                refuse_changes(
                    self.folder, [] if found == known.value else ["the base model's weights"]
                )
            except BadInput:
                log.finish("KILLED")
                raise

    def _log(self) -> SearchLog:
        """Open the search's MLflow run: a new one, or the run of the search that is resumed."""
        job = self.job
        params = {
            "method": job.method,
            "base_model": job.base_model.id, "revision": job.base_model.revision,
            "template": job.data.template,
            "searcher": job.search.searcher, "scheduler": job.search.scheduler,
            "trials": self.prepared.total, "metric": job.search.metric, "steps": job.train.steps,
            "batch_size": job.train.batch_size, "evaluate_every": job.train.evaluate_every,
            "optimizer": job.train.optimizer, "space": job.search.space.model_dump(),
            "train": job.train.model_dump(),
        }  # fmt: skip
        tags = {**search_tags(self.prepared, self.id), "python": platform.python_version()}
        if self.saved is not None:
            return self.registry.resume_search(
                self.saved.run_id, params=params, spill=self.folder.unwritten
            )
        data = data_record(job.data, self.prepared.rows)
        return self.registry.start_search(
            job.name, params, tags, data=data, spill=self.folder.unwritten
        )

    def _search(self, search: Running, log: SearchLog, recorder: Recorder) -> dict[str, Any]:
        """Run the trials and baselines, evaluate the best on the test split, and register it.

        Raises NothingFound when no trial has a result.
        """
        if self.plan:
            self.progress.note(f"planned: about {self.plan.seconds['total']:.0f} s in all")
            log.parent_metrics(self.plan.metrics())
            log.parent_tags({"orchestrator.plan.warnings": "; ".join(self.plan.warnings)})
        if self.prepared.warnings:
            log.parent_tags({"orchestrator.warnings": " ".join(self.prepared.warnings)})
        if reason := why_fewer_trials(self.job.search):
            self.progress.note(f"fewer trials than requested: {reason}")
        self.progress.stage("loading the base model into the worker")
        # Tune starts the trials' actors while the worker loads the model. Once the model is loaded,
        # the baselines are evaluated before the first round of training.
        with search.beside(self._baselines, search, recorder) as baselines_ready:
            with self.progress.trials(self.trials, self.prepared.total, self.history):
                outcome = search.study([recorder, self.progress], self.history)
            baselines, ready_at = baselines_ready.result()
        recorder.flush()
        self.clock.mark("workers", until=ready_at)
        self.clock.mark("trials")
        best = outcome.ranking()
        if not best:
            notes = "; ".join(
                sorted({record.note for record in outcome.records.values() if record.note})
            )
            raise NothingFound(
                f"{no_result(self.job.search, len(outcome.records))}: {notes}",
                "lower the learning rates of search.space, or see the search's log with --verbose",
            )
        self.progress.stage("evaluating the best prompt on the test split")
        top = best[: max(1, self.job.registry.register_top)]
        measured = search.evaluate(
            [
                EvaluationJob("test", record.checkpoint, spec=record.spec, confusion=True)
                for record in top
            ]
        )
        tests = {
            record.id: without_confusion(metrics)
            for record, metrics in zip(top, measured, strict=True)
        }
        self.clock.mark("test")
        info = search.ready()
        self._log_result(log, outcome, best[0], tests[best[0].id])
        reached = {"validation": best[0].metrics, "test": tests[best[0].id]}
        log.parent_tags(
            search_note(self.job, best[0].spec, reached, baselines, self.prepared.warnings)
        )
        with kept_for_resume(self.folder):
            model = (
                None if self.job.is_baseline else self._register(log, best, tests, baselines, info)
            )
            if self.job.is_baseline and self.job.registry.register_top:
                self._keep(log, best[0], reached, info)
        self.clock.mark("registry")
        took = self._took(outcome, search.placement)
        log.parent_metrics(took)
        log.parent_tags(outcome_tags(took, self.plan.metrics() if self.plan else {}))
        document = self._document(outcome, best[0], tests[best[0].id], baselines, model, log)
        if verbalizer := self.prepared.task.encoder.verbalizer:
            counts = confusion_counts(measured[0], len(verbalizer.labels))
            document["best"]["confusion"] = {"labels": list(verbalizer.labels), "counts": counts}
        here = {name: place.shown() for name, place in search.places().items()}
        return {**document, "workers": {**outcome.places, **here}}

    # Baselines

    def _baselines(self, search: Running, recorder: Recorder) -> tuple[dict[str, Any], float]:
        """Evaluate the untuned model: bare, with few-shot examples, and with written instructions.

        Each init text serves as a written instruction, and the best of them by validation is kept.
        Returns the baselines by name, and the moment at which the first worker had loaded the base
        model. A resumed search uses the baselines that it recorded.
        """
        info = search.ready()
        ready_at = time.monotonic()
        if slow := search.slow():
            self.progress.note(f"warning: {slow}")
        if self.history.found(BASE_MODEL) is None:
            recorder.found(BASE_MODEL, info.fingerprint)
        if known := self.history.found(BASELINES):
            return known.value, ready_at
        shown, examples = self.prepared.few_shot
        asked = [None, *self.prepared.instructions, *([shown] if examples else [])]
        jobs = [EvaluationJob(split, instruction=text) for text in asked for split in SPLITS]
        metrics = iter(search.evaluate(jobs))
        written: dict[Any, dict[str, Any]] = {
            text: {split: next(metrics) for split in SPLITS} for text in asked
        }
        found: dict[str, Any] = {"zero_shot": written.pop(None)}
        if examples:
            found["few_shot"] = {"examples": examples, **written.pop(shown)}
        if written:
            sign = 1.0 if self.job.search.better == "max" else -1.0
            text = max(
                written, key=lambda text: sign * written[text]["validation"][self.job.search.metric]
            )
            found["instruction"] = {"text": text, **written[text]}
        recorder.found(BASELINES, found)
        for name, metrics in found.items():
            shown = metrics["validation"][self.job.search.metric]
            self.progress.note(
                f"{BASELINE_NAMES[name]}: validation {self.job.search.metric} {shown:.3f}"
            )
        return found, ready_at

    # Results

    def _log_result(
        self, log: SearchLog, outcome: Outcome, best: TrialRecord, test: Metrics
    ) -> None:
        log.parent_metrics(
            {f"best_validation_{name}": value for name, value in best.metrics.items()}
        )
        log.parent_metrics({f"best_test_{name}": value for name, value in test.items()})
        counts = [record.status for record in outcome.records.values()]
        log.parent_tags(
            {f"orchestrator.{status}": counts.count(status) for status in sorted(set(counts))}
        )
        log.parent_tags({"orchestrator.best_trial": best.id})

    def _took(self, outcome: Outcome, placement: Placement) -> Metrics:
        """Return the search's seconds, device hours and trained steps.

        The seconds exclude those of measuring a plan. The device hours cover training and the test
        evaluation.
        """
        seconds = self.clock.seconds()
        return {
            "seconds": seconds["total"] - seconds.get("plan", 0.0),
            "device_hours": device_hours(placement, seconds["training"] + seconds.get("test", 0.0)),
            "trained_steps": float(sum(record.step for record in outcome.records.values())),
        }

    def _register(
        self,
        log: SearchLog,
        best: list[TrialRecord],
        tests: dict[str, Metrics],
        baselines: dict[str, Any],
        info: BaseModelInfo,
    ) -> dict[str, Any] | None:
        """Register the best trials that an interrupted run has not registered already.

        They are registered from worst to best, so that the best trial becomes the newest version,
        which takes the alias.
        """
        top = best[: self.job.registry.register_top]
        if not top:
            return None
        self.progress.stage(f"registering {self.job.model_name}")
        self._await_registry(log)
        registered = self._registered()
        version = 0
        for record in reversed(top):
            manifest = self._manifest(record, tests[record.id], baselines, info)
            run_id = log.run_ids.get(record.id, log.run_id)
            version = registered.get(run_id) or self._register_one(record, manifest, run_id)
        metric, better = self.job.search.metric, self.job.search.better
        outcome = self.registry.auto_alias(
            self.job.model_name, version, self.job.registry.alias, metric, better
        )
        self.progress.note(outcome.reason)
        return {"name": self.job.model_name, "version": version, "alias": outcome.alias}

    def _await_registry(self, log: SearchLog) -> None:
        """Wait until MLflow has taken everything that was logged.

        A wait that runs out raises nothing: the next call of MLflow fails if it does not answer.
        """
        if not log.flush(SOON_S):
            self.progress.note(
                "MLflow has not taken all reports yet; waiting for it, "
                f"at most {REGISTRY_PATIENCE_S / 60:.0f} minutes"
            )
            log.flush(REGISTRY_PATIENCE_S)

    def _keep(
        self, log: SearchLog, best: TrialRecord, reached: Mapping[str, Metrics], info: BaseModelInfo
    ) -> None:
        """Keep the result of a baseline method in the search's folder and its MLflow run.

        Such a result is not a prompt, so it cannot be registered.
        """
        from orchestrator.tuning.baselines.store import save_result
        from orchestrator.tuning.checkpoint import TrialState

        assert best.checkpoint is not None  # a ranked trial has reported
        self.progress.stage("keeping the result")
        data, folder = self.job.data, self.folder.artifact
        chat = chat_record(self.prepared.task.encoder)
        about = {
            "method": self.job.method, "base_model": asdict(info),
            "template": best.spec.template or data.template,
            "target": data.target, "verbalizer": data.verbalizer, "sentinel": data.sentinel,
            "chat": chat.model_dump() if chat else None,
            "metrics": reached, "costs": asdict(best.costs),
            "steps": best.best_step, "search": self.id, "trial": best.id,
            "orchestrator_version": __version__,
        }  # fmt: skip
        if designs := self.prepared.task.designs:
            about["demonstrations"] = designs.text(Design.of(best.spec))
        # The folder exists if the search was interrupted here before.
        shutil.rmtree(folder, ignore_errors=True)
        save_result(
            folder,
            best.spec,
            TrialState.from_bytes(best.checkpoint).best(),
            self.prepared.source,
            about,
        )
        self._await_registry(log)
        files = {f"baseline/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
        self.registry.log_files(log.run_ids.get(best.id, log.run_id), files)

    def _registered(self) -> dict[str, int]:
        """Return the versions that this search registered before it was interrupted, by run id."""
        if self.saved is None:
            return {}
        try:
            versions = self.registry.versions(self.job.model_name)
        except BadInput:  # there is no such model yet
            return {}
        return {
            it.run_id: it.version
            for it in versions
            if it.run_id and it.tags.get("search") == self.id
        }

    def _register_one(self, record: TrialRecord, manifest: Manifest, run_id: str) -> int:
        """Register a trial's best prompt, and return its version."""
        from orchestrator.tuning.checkpoint import TrialState

        assert record.checkpoint is not None  # a ranked trial has reported
        best = TrialState.from_bytes(record.checkpoint).best()
        tensors = {name: tensor.float().numpy() for name, tensor in best.items()}
        with tempfile.TemporaryDirectory() as folder:
            artifact = PromptArtifact(tensors, manifest).save(Path(folder) / "prompt")
            return self.registry.register(
                artifact,
                self.job.model_name,
                run_id,
                metric=self.job.search.metric,
                example=self.prepared.rows.test[0],
                nearest=nearest_words(self.prepared.source, tensors[SOFT], 3)
                if SOFT in tensors
                else [],
            )

    def _manifest(
        self, record: TrialRecord, test: Metrics, baselines: dict[str, Any], info: BaseModelInfo
    ) -> Manifest:
        data, method, decoding = (
            self.job.data,
            self.prepared.task.method,
            self.prepared.task.decoding,
        )
        return Manifest(
            method=self.job.method,
            num_virtual_tokens=record.spec.num_virtual_tokens,
            config=record.spec.config(),
            reparameterization=ReparameterizationRecord(
                type=method.reparameterization, hidden_size=method.hidden_size
            ),
            template=data.template,
            target=data.target,
            verbalizer=verbalizer_entries(self.prepared.task.encoder),
            cells=cells_record(data),
            sentinel=data.sentinel,
            chat=chat_record(self.prepared.task.encoder),
            special_tokens_in_text=data.special_tokens_in_text,
            max_input_tokens=data.max_input_tokens,
            max_target_tokens=data.max_target_tokens,
            base_model=BaseModelRecord(**asdict(info)),
            data=data_record(data, self.prepared.rows),
            metrics={"validation": record.metrics, "test": test},
            baselines={
                name: {split: found[split] for split in SPLITS} for name, found in baselines.items()
            },
            generation=GenerationRecord(**asdict(decoding)) if decoding else None,
            steps=record.best_step,
            search=self.id,
            trial=record.id,
            orchestrator_version=__version__,
        )

    def _document(
        self,
        outcome: Outcome,
        best: TrialRecord,
        test: Metrics,
        baselines: dict[str, Any],
        model: dict[str, Any] | None,
        log: SearchLog,
    ) -> dict[str, Any]:
        return {
            "search": self.id,
            "status": "succeeded",
            "trials": [record.document() for record in outcome.records.values()],
            "best": {
                "trial": best.id,
                "config": best.spec.config(),
                "metrics": {"validation": best.metrics, "test": test},
                **({"seeds": seeds} if (seeds := outcome.over_seeds(best)) else {}),
            },
            # Not part of "best", which is the same for the same seed.
            "costs": asdict(best.costs),
            "baselines": baselines,
            "model": model,
            **({"artifact": str(self.folder.artifact)} if self.folder.artifact.is_dir() else {}),
            "mlflow": {"tracking_uri": self.registry.display_uri, "run_id": log.run_id},
            "warnings": list(self.prepared.warnings),
            "seconds": self.clock.seconds(),
            **({"plan": self.plan.document()} if self.plan else {}),
        }


BASELINE_NAMES = {
    "zero_shot": "without a prompt",
    "few_shot": "with a few examples",
    "instruction": "with the written instruction",
}

ProgressFactory = Callable[[JobSpec], Progress]
