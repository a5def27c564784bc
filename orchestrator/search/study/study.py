"""The study: Ray Tune over a list of trials, or over trials as they are proposed. The only importer of ray.tune.

A Tune trial is light: a class trainable whose actor is reused, which submits its configuration to the broker and then
relays reports. It imports no torch and holds no model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from orchestrator.cluster.session import started_here
from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.state.history import History
from orchestrator.search.study.replay import replayed, under_way
from orchestrator.search.study.tpe import Proposer
from orchestrator.search.workers.placement import TRIAL_CPUS
from orchestrator.tuning.reports import BROKEN, Report

STEP = "step"  # the schedulers' clock: Tune's own iteration count starts over after a restore
SCORE = "score"  # the best validation metric so far
OWN = "own_score"  # see Report
HANDED = (
    "DEFAULT_ENV_VARS",
    "ENV_VARS_TO_PROPAGATE",
)  # what Tune calls the variables that it hands on
RESTARTS = 3  # of a relay that was lost with its node
STOPPED = {
    STEP: 0,
    SCORE: 0.0,
    OWN: None,
    "report": None,
    "done": True,
    "lost": False,
}  # the last of a stopped trial
LOST = {**STOPPED, "lost": True}  # the same, once the search can't go on


def trial_id(number: int) -> str:
    return f"t{number:03d}"


def trial_number(name: str) -> int:
    return int(name[1:])


class Listener(Protocol):
    """Hears of every trial in the order of events; called in the driver."""

    def trial_started(self, trial: str, spec: TrialSpec) -> None: ...

    def trial_reported(self, trial: str, report: Report) -> None: ...

    def trial_ended(self, trial: str, status: str, note: str) -> None: ...


class RelayTrial(tune.Trainable):
    """A Tune trial: submits itself to the broker with its first step, then hands on one report a step.

    Not when it is made: while it starts Tune may give its trial to a process that has become free, and this one
    another trial later. Two that submit the same trial would be taken for a lost one and its successor.
    """

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._asked = new_config["trial"]
        self._trial = trial_id(self._asked["number"])
        self._submitted = False
        return True

    def _submit(self) -> None:
        if not self._submitted:
            ray.get(
                self._broker.submit.remote(
                    self._trial, self._asked["number"], self._asked["config"]
                )
            )
            self._submitted = True

    def step(self) -> dict[str, Any]:
        try:
            self._submit()
            report: Report | None = ray.get(self._broker.next_report.remote(self._trial))
        except (JobFailed, ray.exceptions.RayActorError):
            return LOST
        if report is None:
            return STOPPED
        found = {STEP: report.step, SCORE: report.score, OWN: report.own_score}
        return {**STOPPED, **found, "report": report, "done": report.ending is not None}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The broker keeps the newest checkpoint of every trial; Tune needs none of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial that starts again goes on from the broker's checkpoint."""


class _Proposals(Searcher):
    """Asks for a trial whenever Tune has a free slot, and passes on what became of it."""

    def __init__(self, proposer: Proposer, begun: Mapping[str, TrialSpec]) -> None:
        super().__init__(metric=SCORE)
        self._proposer = proposer
        self._begun = {trial_number(name): spec for name, spec in begun.items()}
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Trials under way come first where a search goes on."""
        number = next(iter(self._begun), self._proposer.proposed)
        spec = self._begun.pop(number, None) or self._proposer.propose()
        if spec is None:
            finished: str = Searcher.FINISHED
            return finished
        self._numbers[trial_id] = number
        return {"trial": {"number": number, "config": spec.config()}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._proposer.learn(
            self._numbers[trial_id], None if error or result is None else result[OWN]
        )

    def save(self, checkpoint_path: str) -> None:
        """The search's own journal is what a resumption starts from."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""


class Concurrency:
    """How many trials Tune runs at a time, which may grow while it does."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._searcher: BasicVariantGenerator | ConcurrencyLimiter | None = None

    def searcher(self, proposals: Searcher | None) -> BasicVariantGenerator | ConcurrencyLimiter:
        """Tune's source of trials: a list's, or of proposals."""
        self._searcher = (
            BasicVariantGenerator(max_concurrent=self._slots)
            if proposals is None
            else ConcurrencyLimiter(proposals, max_concurrent=self._slots)
        )
        return self._searcher

    def grow(self, slots: int) -> None:
        self._slots = slots
        if self._searcher is not None:
            self._searcher.max_concurrent = (
                slots  # both read it whenever Tune asks for another trial
            )


class _Relay(Callback):
    """Tells the broker at once what Tune decided, and the listeners what happened."""

    def __init__(
        self, broker: Any, listeners: Sequence[Listener], targets: _Targets, trials: Sequence[str]
    ) -> None:
        self._broker = broker
        self._listeners = listeners
        self._targets = targets
        self._open = dict.fromkeys(trials)
        self._last: dict[str, Report] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes its callbacks to disk, to restore them; a restored study is given new listeners."""
        return type(self), (None, (), None, ())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        asked = trial.config["trial"]
        self._open[trial_id(asked["number"])] = None
        for listener in self._listeners:
            listener.trial_started(
                trial_id(asked["number"]), TrialSpec.from_config(asked["config"])
            )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        report = result.pop("report")
        if report is None:
            return
        self._last[trial.trial_id] = report
        self._broker.decide.remote(report.trial, not result.get("done"))
        if self._targets.why:
            self._broker.end_trials.remote()  # Tune now waits for the other trials, and they for their reports
        for listener in self._listeners:
            listener.trial_reported(report.trial, report)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        report = self._last.get(trial.trial_id)
        if report is not None and not self._targets.lost:
            self.ended(report)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial_id(trial.config["trial"]["number"])
        self._broker.decide.remote(name, False)
        self._ended(name, "failed", "see the search's log")

    def ended(self, report: Report) -> None:
        """A trial's last report was this one."""
        status = "failed" if report.ending in BROKEN else "finished" if report.ending else "stopped"
        self._ended(report.trial, status, self._why(report))

    def end(self) -> None:
        """Tune has ended: trials that it left where they were, or never started, are stopped."""
        ray.get(self._broker.end_trials.remote())
        for name in [] if self._targets.lost else list(self._open):
            self._ended(name, "stopped", self._targets.why)

    def _ended(self, name: str, status: str, note: str) -> None:
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
    """Ends the search when its metric or its minutes are reached, or its workers are lost."""

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
    """The spec's scheduler, on our own step count."""
    common = {"time_attr": STEP, "metric": SCORE, "mode": job.search.better}
    grace = job.search.grace_steps or job.train.evaluate_every
    if job.search.scheduler == "asha":
        rungs = {
            "grace_period": min(grace, job.train.steps),
            "reduction_factor": job.search.reduction_factor,
        }
        return ASHAScheduler(max_t=job.train.steps, **rungs, **common)
    if job.search.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, min_samples_required=3, **common)
    return (
        FIFOScheduler()
    )  # with pbt too: no trial is stopped, and the broker lets them copy each other


def proposes(job: JobSpec) -> bool:
    """Whether trials are proposed while the search runs."""
    return job.search.searcher == "optuna"


def _source(
    proposer: Proposer | None, trials: Mapping[str, TrialSpec], concurrency: Concurrency
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where Tune takes trials from: its parameter space for a list, and its options."""
    if proposer is None:
        listed = [
            {"number": trial_number(name), "config": spec.config()} for name, spec in trials.items()
        ]
        return {"trial": tune.grid_search(listed)}, {"search_alg": concurrency.searcher(None)}
    searcher = concurrency.searcher(_Proposals(proposer, trials))
    return {}, {"search_alg": searcher, "num_samples": len(trials) + proposer.left}


@dataclass(frozen=True)
class _Stand:
    """Stands for a trial in a scheduler that goes on: the same for its earlier reports and for those to come."""

    trial_id: str


class Continued(TrialScheduler):
    """A scheduler that knows a search's earlier reports, and decides on the later ones as if it had never stopped.

    Tune gives a trial another id in every process; the scheduler inside sees ours.
    """

    def __init__(self, inner: TrialScheduler) -> None:
        super().__init__()
        self._inner = inner
        self._metric = inner.metric
        self._known: set[str] = set()

    def learn(self, history: History, targets: _Targets) -> dict[str, Report]:
        """Pass it the earlier reports in their order, as Tune would have. Returns the last report of each trial that
        is over by its own ending, the scheduler's decision or a target."""
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

    def _stand(self, name: str) -> _Stand:
        stand = _Stand(name)
        if name not in self._known:
            self._known.add(name)
            self._inner.on_trial_add(_NO_TUNE, stand)
        return stand

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._stand(_name(trial))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_error(tune_controller, self._stand(_name(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(self._inner.on_trial_result(tune_controller, self._stand(_name(trial)), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._inner.on_trial_complete(tune_controller, self._stand(_name(trial)), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_remove(tune_controller, self._stand(_name(trial)))

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """The search's own journal is what a resumption starts from."""

    def restore(self, checkpoint_path: str) -> None:
        """See ``save``."""


class _NoTune:
    """What a scheduler sees of Tune while it learns: no trial waits."""

    def get_live_trials(self) -> set[Any]:
        return set()


_NO_TUNE = _NoTune()


def _name(trial: Any) -> str:
    return trial_id(trial.config["trial"]["number"])


def run_study(
    job: JobSpec,
    trials: Sequence[TrialSpec],
    broker: Any,
    concurrency: Concurrency,
    storage: Path,
    listeners: Sequence[Listener],
    history: History,
) -> None:
    """Run the trials that are not over yet to their end; listeners hear of them. Returns when Tune has none left.

    With a searcher that proposes trials ``trials`` is empty.
    """
    targets = _Targets(job, history.spent_s)
    names = {trial_id(number): spec for number, spec in enumerate(trials)}
    proposer = Proposer(job.search) if proposes(job) else None
    if proposer:
        numbered = {trial_number(name): config for name, config in history.configs().items()}
        names = {trial_id(number): spec for number, spec in enumerate(proposer.replay(numbered))}
    relay = _Relay(broker, listeners, targets, history.remaining(names))
    decides, over = scheduler(job), {}
    if history.events:
        decides = Continued(decides)
        over = decides.learn(history, targets)
    left = [name for name in history.remaining(names) if name not in over]
    for name in history.remaining(over):  # its last report was kept, and what was decided of it not
        relay.ended(over[name])
    total = len(left)
    if proposer:
        for name, score in history.own_scores().items():
            if name not in left:
                proposer.learn(trial_number(name), score)
        total += proposer.left
    population, copies = replayed(job, history, left)
    begun = {
        name: under_way(history, name, copies.get(name)) for name in left if name in history.steps()
    }
    ray.get(broker.expect.remote(total, begun, population))
    if total and not targets.stop_all():
        trials_left = {name: names[name] for name in left}
        _tune(proposer, trials_left, broker, concurrency, storage, targets, relay, decides)
    relay.end()


@contextmanager
def _plain_trials() -> Iterator[None]:
    """Tune hands no environment variables to the processes that it starts meanwhile: see worker_group.py."""
    from ray.tune.execution import class_cache

    before = {name: value for name, value in vars(class_cache).items() if name in HANDED}
    vars(class_cache).update({name: type(value)() for name, value in before.items()})
    try:
        yield
    finally:
        vars(class_cache).update(before)


def _tune(
    proposer: Proposer | None,
    trials: Mapping[str, TrialSpec],
    broker: Any,
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
    with _plain_trials() if started_here() else nullcontext():
        tuner.fit()
