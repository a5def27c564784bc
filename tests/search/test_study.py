"""A scheduler restored from a history decides as one that was never interrupted."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from small_jobs import small_job

from orchestrator.job.spec import JobSpec
from orchestrator.search.state.events import Event, Reported
from orchestrator.search.state.history import History
from orchestrator.search.state.trials import trial_id
from orchestrator.search.study.study import SCORE, STEP, Continued, _Targets, scheduler
from orchestrator.tuning.reports import Report

STEPS = (4, 8, 12, 16)
TRIALS = 20


@pytest.fixture(params=["asha", "median", "fifo"])
def job(request: pytest.FixtureRequest, tmp_path: Any) -> JobSpec:
    return small_job(tmp_path, search__scheduler=request.param, search__metric="accuracy")


def tune_trial(number: int, prefix: str) -> Any:
    """Return what a scheduler sees of a Tune trial; the id differs between processes."""
    return SimpleNamespace(trial_id=f"{prefix}_{number}", config={"trial": {"number": number}})


class Tune:
    """Feeds reports to a scheduler as Tune does, and records its decisions."""

    def __init__(self, decides: Any, prefix: str) -> None:
        self.decides, self.prefix = decides, prefix
        self.trials: dict[int, Any] = {}
        self.over: set[int] = set()

    def get_live_trials(self) -> set[Any]:
        return set()

    def report(self, number: int, step: int, score: float) -> None:
        if number in self.over:
            return
        if number not in self.trials:
            self.trials[number] = SimpleHash(tune_trial(number, self.prefix))
            self.decides.on_trial_add(self, self.trials[number])
        trial, result = self.trials[number], {STEP: step, SCORE: score}
        if step == STEPS[-1] or self.decides.on_trial_result(self, trial, result) == "STOP":
            self.decides.on_trial_complete(self, trial, result)
            self.over.add(number)


class SimpleHash:
    """A hashable trial, as Tune's own."""

    def __init__(self, trial: Any) -> None:
        self.trial_id, self.config = trial.trial_id, trial.config


def as_report(number: int, step: int, score: float) -> Report:
    metrics = {"accuracy": score, "loss": 1.0}
    ending: Any = "steps" if step == STEPS[-1] else None
    return Report(trial_id(number), step, metrics, 0.0, step, metrics, score, b"", ending)


@pytest.mark.parametrize("seed", range(5))
def test_a_scheduler_that_goes_on_decides_as_if_it_had_not_stopped(job: JobSpec, seed: int) -> None:
    """Wherever the history is cut, the restored scheduler stops the same trials.

    This includes trials already over in the history and those that stop later.
    """
    rng = random.Random(seed)
    scores = {number: sorted(rng.random() for _ in STEPS) for number in range(TRIALS)}
    order = [(number, place) for group in range(0, TRIALS, 4) for place in range(len(STEPS))
             for number in range(group, group + 4)]  # fmt: skip
    feed = [(number, STEPS[place], scores[number][place]) for number, place in order]
    uncut = Tune(scheduler(job), "a")
    seen = []  # reports up to each trial's end
    for one in feed:
        if one[0] not in uncut.over:
            seen.append(one)
        uncut.report(*one)
    assert (len(seen) < len(feed)) == (
        job.search.scheduler != "fifo"
    )  # some trials were stopped early, so there are decisions to repeat
    for cut in range(1, len(seen), 7):
        events: list[Event] = [Reported(as_report(*one)) for one in seen[:cut]]
        decides = Continued(scheduler(job))
        over = decides.learn(History(events), _Targets(job))
        later = Tune(decides, "b")
        later.over = {int(name[1:]) for name in over}
        for one in seen[cut:]:
            assert one[0] not in later.over  # the uncut scheduler let it go on
            later.report(*one)
        assert later.over == uncut.over


def test_a_target_reached_before_is_known(job: JobSpec) -> None:
    """Earlier reports count for search.stop.metric, and earlier minutes for search.stop.minutes."""
    aim = job.model_copy(
        update={
            "search": job.search.model_copy(
                update={"stop": SimpleNamespace(metric=0.8, minutes=None)}
            )
        }
    )
    targets = _Targets(aim)
    Continued(scheduler(job)).learn(History([Reported(as_report(0, 4, 0.9))]), targets)
    assert targets.why == "search.stop.metric was reached"
    timed = job.model_copy(
        update={
            "search": job.search.model_copy(
                update={"stop": SimpleNamespace(metric=None, minutes=1.0)}
            )
        }
    )
    assert not _Targets(timed, spent_s=50.0).stop_all()
    assert _Targets(timed, spent_s=61.0).stop_all()
