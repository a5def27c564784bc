"""The study: Ray Tune over a list of trials, or over trials as they are proposed.

This is the only importer of ray.tune. A Tune trial carries the number and the spec of one of our
trials. It is light: a class trainable whose actor is reused. It submits the trial to the broker and
then relays reports. It imports no torch and holds no model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from orchestrator.cluster import actors
from orchestrator.cluster.ray_internals.tune import plain_trials
from orchestrator.cluster.session import started_here
from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.events import Listener
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import TrialStatus, trial_id, trial_number
from orchestrator.search.study.replay import replayed
from orchestrator.search.study.tpe import Proposer
from orchestrator.search.workers.placement import TRIAL_CPUS
from orchestrator.tuning.reports import BROKEN, Report

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from orchestrator.search.workers.broker import BrokerHandle

STEP = "step"  # the schedulers' clock: Tune's own iteration count starts over after a restore
SCORE = "score"  # the best validation metric so far
OWN = "own_score"  # see Report
RESTARTS = 3  # allowed for a relay that was lost with its node
# The last result of a trial that was stopped.
STOPPED = {
    STEP: 0,
    SCORE: 0.0,
    OWN: None,
    "report": None,
    "done": True,
    "lost": False,
}
LOST = {**STOPPED, "lost": True}  # the same, when the search can't continue


class RelayTrial(tune.Trainable):
    """A Tune trial that submits itself to the broker and then relays a report per step.

    The trial is submitted with its first step, not when the trainable is created: meanwhile Tune
    may give the trial to another process that has become free, and later give this process another
    trial. If two processes submitted the same trial, the broker would take them for a lost trial
    and its successor.
    """

    def setup(self, config: dict[str, Any], broker: BrokerHandle) -> None:
        self._broker = broker
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number, self._spec = new_config["trial"]["number"], new_config["trial"]["spec"]
        self._trial = trial_id(self._number)
        self._submitted = False
        return True

    def _submit(self) -> None:
        if not self._submitted:
            actors.get(self._broker.submit.remote(self._trial, self._number, self._spec))
            self._submitted = True

    def step(self) -> dict[str, Any]:
        try:
            self._submit()
            report = actors.get(self._broker.next_report.remote(self._trial))
        except (JobFailed, ray.exceptions.RayActorError):
            return LOST
        if report is None:
            return STOPPED
        found = {STEP: report.step, SCORE: report.score, OWN: report.own_score}
        return {**STOPPED, **found, "report": report, "done": report.ending is not None}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the broker keeps the newest checkpoint of every trial."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: a restarted trial continues from the broker's checkpoint."""


class _Proposals(Searcher):
    """A searcher that proposes a trial when Tune has a free slot, and passes on its result."""

    def __init__(self, proposer: Proposer, begun: Mapping[str, TrialSpec]) -> None:
        super().__init__(metric=SCORE)
        self._proposer = proposer
        self._begun = {trial_number(name): spec for name, spec in begun.items()}
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Suggest a trial; in a resumed search the trials under way come first."""
        number = next(iter(self._begun), self._proposer.proposed)
        spec = self._begun.pop(number, None) or self._proposer.propose()
        if spec is None:
            finished: str = Searcher.FINISHED
            return finished
        self._numbers[trial_id] = number
        return {"trial": {"number": number, "spec": spec}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._proposer.learn(
            self._numbers[trial_id], None if error or result is None else result[OWN]
        )

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search resumes from its own journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing; see ``save``."""


class Concurrency:
    """The number of trials that Tune runs at a time, which may grow during the search."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._searcher: BasicVariantGenerator | ConcurrencyLimiter | None = None

    def searcher(self, proposals: Searcher | None) -> BasicVariantGenerator | ConcurrencyLimiter:
        """Return Tune's source of trials: a given list, or proposals."""
        self._searcher = (
            BasicVariantGenerator(max_concurrent=self._slots)
            if proposals is None
            else ConcurrencyLimiter(proposals, max_concurrent=self._slots)
        )
        return self._searcher

    def grow(self, slots: int) -> None:
        self._slots = slots
        if self._searcher is not None:
            # Both kinds of searchers read this whenever Tune asks for another trial.
            self._searcher.max_concurrent = slots


class _Relay(Callback):
    """A callback that passes Tune's decisions to the broker, and events to the listeners."""

    def __init__(
        self,
        broker: BrokerHandle,
        listeners: Sequence[Listener],
        targets: _Targets,
        trials: Sequence[str],
    ) -> None:
        self._broker = broker
        self._listeners = listeners
        self._targets = targets
        self._open = dict.fromkeys(trials)
        self._last: dict[str, Report] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without listeners.

        Tune writes its callbacks to disk to restore them, but a restored study is given new
        listeners.
        """
        return type(self), (None, (), None, ())

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        name = _name(trial)
        self._open[name] = None
        for listener in self._listeners:
            listener.trial_started(name, trial.config["trial"]["spec"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        report = result.pop("report")
        if report is None:
            return
        self._last[trial.trial_id] = report
        self._broker.decide.remote(report.trial, not result.get("done"))
        if self._targets.why:
            # Tune now waits for the other trials, which wait for their reports.
            self._broker.end_trials.remote()
        for listener in self._listeners:
            listener.trial_reported(report.trial, report)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        report = self._last.get(trial.trial_id)
        if report is not None and not self._targets.lost:
            self.ended(report)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        name = _name(trial)
        self._broker.decide.remote(name, False)
        self._ended(name, TrialStatus.FAILED, "see the search's log")

    def ended(self, report: Report) -> None:
        """Record that a trial ended with this report."""
        if report.ending in BROKEN:
            status = TrialStatus.FAILED
        else:
            status = TrialStatus.FINISHED if report.ending else TrialStatus.STOPPED
        self._ended(report.trial, status, self._why(report))

    def end(self) -> None:
        """Record that Tune has ended; trials that it left unfinished or unstarted are stopped."""
        actors.get(self._broker.end_trials.remote())
        for name in [] if self._targets.lost else list(self._open):
            self._ended(name, TrialStatus.STOPPED, self._targets.why)

    def _ended(self, name: str, status: TrialStatus, note: str) -> None:
        self._open.pop(name, None)
        for listener in self._listeners:
            listener.trial_ended(name, status, note)

    def _why(self, report: Report) -> str:
        if report.ending in BROKEN:
            why = f"{BROKEN[report.ending]} at step {report.step}"
        else:
            why = report.ending or self._targets.why or "by the scheduler"
        return f"{why}; {report.note}" if report.note else why


class _Targets(Stopper):
    """A stopper that ends the search at its target metric or time limit, or without workers."""

    def __init__(self, job: JobSpec, spent_s: float = 0.0) -> None:
        self._metric, self._minutes = job.search.stop.metric, job.search.stop.minutes
        self._sign = 1.0 if job.search.better == "max" else -1.0
        self._started = time.monotonic() - spent_s
        self.lost = False
        self.why = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result["report"] is None:
            self.lost = self.lost or result["lost"]
        elif self._metric is not None and self._sign * result[SCORE] >= self._sign * self._metric:
            self.why = "search.stop.metric was reached"
        return self.stop_all()

    def stop_all(self) -> bool:
        if self._minutes is not None and time.monotonic() - self._started > 60 * self._minutes:
            self.why = self.why or "search.stop.minutes were over"
        return self.lost or bool(self.why)


def scheduler(job: JobSpec) -> TrialScheduler:
    """Return the spec's scheduler, which counts our own steps."""
    common = {"time_attr": STEP, "metric": SCORE, "mode": job.search.better}
    grace = job.search.grace_steps or job.train.evaluate_every
    match job.search.scheduler:
        case "asha":
            rungs = {
                "grace_period": min(grace, job.train.steps),
                "reduction_factor": job.search.reduction_factor,
            }
            return ASHAScheduler(max_t=job.train.steps, **rungs, **common)
        case "median":
            return MedianStoppingRule(grace_period=grace, min_samples_required=3, **common)
        case "fifo" | "pbt":  # pbt stops no trial: the broker lets trials copy each other
            return FIFOScheduler()


def proposes(job: JobSpec) -> bool:
    """Tell whether trials are proposed while the search runs."""
    return job.search.proposes


def _source(
    proposer: Proposer | None, trials: Mapping[str, TrialSpec], concurrency: Concurrency
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Tune's parameter space and its options for the source of trials.

    The parameter space is empty where trials are proposed.
    """
    if proposer is None:
        listed = [{"number": trial_number(name), "spec": spec} for name, spec in trials.items()]
        return {"trial": tune.grid_search(listed)}, {"search_alg": concurrency.searcher(None)}
    searcher = concurrency.searcher(_Proposals(proposer, trials))
    return {}, {"search_alg": searcher, "num_samples": len(trials) + proposer.left}


@dataclass(frozen=True)
class _TuneTrial:
    """A stand-in for a Tune trial in a resumed scheduler, the same before and after the break."""

    trial_id: str


class Continued(TrialScheduler):
    """A scheduler that knows a search's earlier reports.

    It decides on later reports as if the search had never stopped. Tune gives a trial another id in
    every process; the inner scheduler sees our ids.
    """

    def __init__(self, inner: TrialScheduler) -> None:
        super().__init__()
        self._inner = inner
        self._metric = inner.metric
        self._known: set[str] = set()

    def learn(self, history: History, targets: _Targets) -> dict[str, Report]:
        """Pass the earlier reports to the inner scheduler in their order, as Tune would have.

        Return the last report of each trial that is over, by its own ending, the scheduler's
        decision or a target.
        """
        over: dict[str, Report] = {}
        for report in history.reports:
            stand = self._stand(report.trial)
            result = {
                STEP: report.step,
                SCORE: report.score,
                "report": report,
                "done": report.ending is not None,
            }
            stops = targets(report.trial, result) or report.ending is not None
            if not stops:
                stops = self._inner.on_trial_result(_NO_TUNE, stand, result) == TrialScheduler.STOP
            if stops:
                self._inner.on_trial_complete(_NO_TUNE, stand, result)
                over[report.trial] = report
        return over

    def _stand(self, name: str) -> _TuneTrial:
        stand = _TuneTrial(name)
        if name not in self._known:
            self._known.add(name)
            self._inner.on_trial_add(_NO_TUNE, stand)
        return stand

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        self._stand(_name(trial))

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        self._inner.on_trial_error(tune_controller, self._stand(_name(trial)))

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        return str(self._inner.on_trial_result(tune_controller, self._stand(_name(trial)), result))

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        self._inner.on_trial_complete(tune_controller, self._stand(_name(trial)), result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        self._inner.on_trial_remove(tune_controller, self._stand(_name(trial)))

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search resumes from its own journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing; see ``save``."""


class _NoTune:
    """A stand-in for Tune's controller while a scheduler learns; it has no live trials."""

    def get_live_trials(self) -> set[Trial]:
        return set()


_NO_TUNE = _NoTune()


def _name(trial: Trial) -> str:
    return trial_id(trial.config["trial"]["number"])


def run_study(
    job: JobSpec,
    trials: Sequence[TrialSpec],
    broker: BrokerHandle,
    concurrency: Concurrency,
    storage: Path,
    listeners: Sequence[Listener],
    history: History,
    first: int = 0,
) -> None:
    """Run the trials that are not over yet to their end, and report to the listeners.

    Returns when Tune has no trial left. ``trials`` is empty with a searcher that proposes trials.
    ``first`` is the number of the first trial.
    """
    targets = _Targets(job, history.spent_s)
    names = {trial_id(number): spec for number, spec in enumerate(trials, first)}
    proposer = Proposer(job.search) if proposes(job) else None
    if proposer:
        numbered = {trial_number(name): spec for name, spec in history.first_specs().items()}
        names = {trial_id(number): spec for number, spec in enumerate(proposer.replay(numbered))}
    relay = _Relay(broker, listeners, targets, history.remaining(names))
    decides, over = scheduler(job), {}
    if history.events:
        decides = Continued(decides)
        over = decides.learn(history, targets)
    left = [name for name in history.remaining(names) if name not in over]
    # The journal has the last report of these trials, but not the decision that ended them.
    for name in history.remaining(over):
        relay.ended(over[name])
    total, records = len(left), history.outcome().records
    if proposer:
        for name, record in records.items():
            if name not in left:
                proposer.learn(trial_number(name), record.own_score)
        total += proposer.left
    population, copies = replayed(job, history, left)
    begun = {name: records[name] for name in left if name in records}
    actors.get(broker.expect.remote(total, begun, population, copies))
    if total and not targets.stop_all():
        trials_left = {name: names[name] for name in left}
        _tune(proposer, trials_left, broker, concurrency, storage, targets, relay, decides)
    relay.end()


def _tune(
    proposer: Proposer | None,
    trials: Mapping[str, TrialSpec],
    broker: BrokerHandle,
    concurrency: Concurrency,
    storage: Path,
    targets: _Targets,
    relay: _Relay,
    decides: TrialScheduler,
) -> None:
    listed, proposed = _source(proposer, trials, concurrency)
    trainable = tune.with_resources(
        tune.with_parameters(RelayTrial, broker=broker),
        tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}]),
    )
    tuner = tune.Tuner(
        trainable,
        param_space=listed,
        tune_config=TuneConfig(scheduler=decides, reuse_actors=True, **proposed),
        run_config=RunConfig(
            name="tune",
            storage_path=str(storage),
            stop=targets,
            callbacks=[relay],
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with plain_trials() if started_here() else nullcontext():
        tuner.fit()
