"""A tuning job from spec to registered model: prepare, search, compare with baselines, register, promote."""

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
RESTARTS = 3  # of a whole search whose broker or controller was lost
SOON_S = 10.0
REGISTRY_PATIENCE_S = 600.0
"""How long a search that is over waits for MLflow; nothing is lost beyond it, `resume` registers later."""


class Progress(Listener, Protocol):
    """What the command line shows; ``stage`` names what goes on outside the trials."""

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def trials(
        self, trials: Sequence[tuple[str, TrialSpec]], total: int, history: History
    ) -> AbstractContextManager[None]: ...


@dataclass
class Clock:
    """Where the seconds go."""

    started: float = field(default_factory=time.monotonic)
    marks: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def after(cls, seconds: float) -> Clock:
        """Make a clock that was started so many seconds ago."""
        started = time.monotonic() - seconds
        return cls(started=started, last=started)

    def mark(self, name: str, until: float | None = None) -> None:
        """Everything since the last mark, up to a moment or to now, was spent on ``name``."""
        moment = time.monotonic() if until is None else until
        self.marks[name] = round(self.marks.get(name, 0.0) + moment - self.last, 3)
        self.last = moment

    def before(self) -> float:
        """Seconds up to a Ray that is up, without those of making a model, which is done once."""
        return self.marks.get("prepare", 0.0) + self.marks.get("ray", 0.0)

    def seconds(self) -> dict[str, float]:
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
    """Run the job; returns the document of ``run --json``. Raises OrchestratorError; nothing half-made stays behind.

    ``planned``: measure first, and keep the estimate beside the outcome. ``folder``: keep the search there; one of its
    own unless given. ``inputs``: what was found of the job's files, checked here unless given. An interrupt raises
    Interrupted, once there is a search that can be resumed.
    """
    inputs = inputs or check_inputs(job)  # before Ray is started, whose start and end take seconds
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
    """What the job will take; nothing is kept. Raises OrchestratorError, BadInput for what ``run_job`` would refuse.

    A cluster is only asked for its nodes; the measuring is done on this machine, where the search's start is rehearsed
    if it is here that the search would run.
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
    """Show what makes the result less trustworthy."""
    for warning in prepared.warnings:
        progress.note(f"warning: {warning}")


def check_search_end(job: JobSpec, registry: Registry) -> None:
    """Raise BadInput or Unreachable, before anything is spent, for what would keep the result from being registered."""
    registers = job.registry.register_top > 0 and not job.is_baseline
    registry.check_search_end(job.name, job.model_name if registers else None)


@contextmanager
def kept_for_resume(folder: SearchFolder) -> Iterator[None]:
    """Around the registration: a refusal says that the search is kept and can be registered later."""
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
    """The folder of each prompt that trials start from: a local one as it is, a registered one fetched. Also which
    versions those are; ``pins`` says which they have to be."""
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
    """Around a search: what ends it early says how to go on, once there is something to go on from."""
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
    """The message, and what else went wrong while the search ended."""
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
        """``saved`` and ``history`` are those of a search that goes on; ``planned`` measures first."""
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
        """Search, compare, register. ``ours`` says that Ray's processes are this search's own."""
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
        """The search from where it stands, until it is done or lost."""
        workers = partial(running, self.prepared, placement, self.folder.ray)
        # MLflow refuses before any worker is started. Its run is closed before they are stopped, which takes
        # longer than a process has that was told to end; the outer context closes it where none can be started.
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
                    save_processes(self.folder.processes)  # again: Ray's agents come a little later
                return self._search(search, log, recorder)

    def _report(self) -> None:
        """Draw the search, for its folder and its run. What was found stands, whatever becomes of its pictures."""
        self.progress.stage("drawing the report")
        try:
            write_report(read_facts(self.folder), self.folder.report, self.registry)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.progress.note(f"no report: {text}; again with orchestrator report {self.id}")

    def _check_base_model(self, search: Running, log: SearchLog) -> None:
        """Refuse to go on with a search on other weights than it began with; its run stays interrupted."""
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
        job = self.job
        params = {
            "method": job.method, "base_model": job.base_model.id, "revision": job.base_model.revision,
            "template": job.data.template, "searcher": job.search.searcher, "scheduler": job.search.scheduler,
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
        if self.plan:
            self.progress.note(f"planned: about {self.plan.seconds['total']:.0f} s in all")
            log.parent_metrics(self.plan.metrics())
            log.parent_tags({"orchestrator.plan.warnings": "; ".join(self.plan.warnings)})
        if self.prepared.warnings:
            log.parent_tags({"orchestrator.warnings": " ".join(self.prepared.warnings)})
        if reason := why_fewer_trials(self.job.search):
            self.progress.note(f"fewer trials than requested: {reason}")
        self.progress.stage("loading the base model into the worker")
        # Tune starts its trials' actors while the worker loads the model; the baselines go first once it has.
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
        """The model as it stands, and behind each init text as a written instruction; the best text by validation.

        Also the moment at which the first worker had loaded the base model.
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
        """What the search took: seconds in all, without a plan's; hours of the devices while they worked; steps."""
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
        """Register the best trials, those not registered before.

        The worst of them is first, so that the best is the newest version and takes the alias.
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
        """Until MLflow has all that was logged, so that it answers; whoever asks it next finds out if it does not."""
        if not log.flush(SOON_S):
            self.progress.note(
                f"MLflow has not taken all reports yet; waiting for it, at most {REGISTRY_PATIENCE_S / 60:.0f} minutes"
            )
            log.flush(REGISTRY_PATIENCE_S)

    def _keep(
        self, log: SearchLog, best: TrialRecord, reached: Mapping[str, Metrics], info: BaseModelInfo
    ) -> None:
        """Keep a baseline's result in the search's folder and with its run: it is no prompt to register."""
        from orchestrator.tuning.baselines.store import save_result
        from orchestrator.tuning.checkpoint import TrialState

        assert best.checkpoint is not None  # a ranked trial has reported
        self.progress.stage("keeping the result")
        data, folder = self.job.data, self.folder.artifact
        about = {
            "method": self.job.method, "base_model": asdict(info), "template": best.spec.template or data.template,
            "target": data.target, "verbalizer": data.verbalizer, "sentinel": data.sentinel,
            "metrics": reached, "costs": asdict(best.costs),
            "steps": best.best_step, "search": self.id, "trial": best.id, "orchestrator_version": __version__,
        }  # fmt: skip
        if designs := self.prepared.task.designs:
            about["demonstrations"] = designs.text(Design.of(best.spec))
        shutil.rmtree(folder, ignore_errors=True)  # of a search that was interrupted here
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
        """Run to version, of what this search registered before it was interrupted."""
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
            "costs": asdict(
                best.costs
            ),  # beside the best trial, which is the same for the same seed
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
