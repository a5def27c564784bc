"""The section ``search``: which trials to run, how to rank them and when to stop them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from orchestrator.job.metrics import Better, BuiltinMetric, CustomMetric, Metric, metric_named
from orchestrator.job.spec.base import Conflict, PositiveFloat, PositiveInt, Section, Seed
from orchestrator.job.spec.space import LogUniform, SpaceSpec, Uniform

DEFAULT_TRIALS = 16
MAX_TRIALS = 10_000
MAX_CONFIRM_SEEDS = 100
Searcher: TypeAlias = Literal["random", "grid", "optuna"]
PROPOSING: frozenset[Searcher] = frozenset({"optuna"})
"""Searchers that propose each trial while the search runs. Others list all trials before it."""
Scheduler: TypeAlias = Literal["asha", "pbt", "median", "fifo"]


class StopSpec(Section):
    """Targets that end the search early."""

    metric: float | None = None
    """End the search once a trial's validation metric is at least as good as this value. The runs
    of search.confirm follow nonetheless."""
    minutes: PositiveFloat | None = None
    """Time limit of the search, in minutes. No training step starts after it, except those of
    search.confirm, whose number is known beforehand."""


class SearchSpec(Section):
    """Trials to run, how to rank them and when to stop them."""

    space: SpaceSpec = SpaceSpec()
    """The dimensions in which the trials differ."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of trials to draw: by default the whole grid with searcher grid, and 16 otherwise. A
    space with fewer points gives fewer trials."""
    searcher: Searcher = "random"
    """Method of drawing trials from the space. random spreads them at random, grid takes every
    combination, and optuna proposes each trial from the results of the earlier ones (TPE)."""
    scheduler: Scheduler = "asha"
    """Treatment of bad trials. asha and median stop them early, pbt lets them continue from a
    better trial's prompt with another learning rate, and fifo stops none."""
    grace_steps: PositiveInt | None = None
    """First rung of ASHA, or the first step at which median may stop a trial. No trial is stopped
    before it. train.evaluate_every by default."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """ASHA keeps one out of this many trials at each rung."""
    perturbation_steps: PositiveInt | None = None
    """Steps between two comparisons of PBT, at each of which bad trials copy good ones;
    train.evaluate_every by default."""
    metric: BuiltinMetric | CustomMetric = "accuracy"
    """Validation metric that ranks trials. accuracy, macro_f1, weighted_f1, mcc (Matthews
    correlation), roc_auc and ece (expected calibration error) judge the verbalizer's labels;
    exact_match requires the target's tokens; bleu, rouge_l and f1 (SQuAD's, over words) compare a
    generated text with the references; loss is the loss on the target. module:function names a
    function of your own over (predictions, references, scores), which every worker can import."""
    mode: Better | None = None
    """Direction in which the metric improves, max or min. It follows from the metric by default,
    and the other direction is refused. For a function of your own it is max by default."""
    seed: Seed = 0
    """Seed of the draws from the space, of PBT's choices, of the rows of the few-shot baseline,
    and of the seeds of search.confirm."""
    confirm: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of the best configurations to train again under fresh seeds, to the last step, once
    the trials are over. They are then ranked by their mean over these seeds, since the best of
    many trials is partly the luckiest. By default none is trained again."""
    confirm_seeds: Annotated[int, Field(ge=2, le=MAX_CONFIRM_SEEDS)] = 3
    """Number of fresh seeds under which search.confirm trains each configuration. They follow from
    search.seed, are the same for every configuration, and are none of search.space.seed."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 4
    """Number of training rows that the few-shot baseline writes in front of an input. It writes
    fewer where the model's context is too short; 0 leaves the baseline out."""
    stop: StopSpec = StopSpec()
    """Targets that end the search early."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.mode not in (None, self.better):
            text = (
                f"{self.mode} would look for the worst {self.metric}; leave mode out or set "
                f"{self.better}"
            )
            yield Conflict("mode", text, ("metric",))
        yield from self._grid_conflicts()
        yield from self._mix_conflicts()
        yield from self._population_conflicts()
        yield from self._confirmation_conflicts()
        target = self.stop.metric
        metric = self.ranked_by
        if target is not None and not metric.lowest <= target <= metric.highest:
            text = f"{target:g} is no {self.metric}: {metric.range_text}"
            yield Conflict("stop.metric", text, ("metric",))

    def _grid_conflicts(self) -> Iterator[Conflict]:
        if self.searcher != "grid":
            return
        for method, space in self.space.parts.items():
            if isinstance(space.learning_rate, LogUniform | Uniform):
                of_method = f" for {method}" if method else ""
                text = (
                    f"grid needs listed values and space.learning_rate is a range{of_method}; "
                    "list values or use searcher random"
                )
                yield Conflict("searcher", text, ("space.learning_rate", "space.method"))
                return

    def _mix_conflicts(self) -> Iterator[Conflict]:
        methods = self.space.method
        if methods is None:
            return
        if self.scheduler == "pbt":
            text = (
                "pbt copies the prompts of better trials, and a prompt of one method does not fit "
                "another; use asha, median or fifo, or leave space.method out"
            )
            yield Conflict("scheduler", text, ("space.method",))
        if self.trials is not None and self.trials < len(methods):
            text = (
                f"{self.trials} would leave out some of the {len(methods)} methods of "
                f"space.method; raise it to at least {len(methods)}"
            )
            yield Conflict("trials", text, ("space.method",))

    def _confirmation_conflicts(self) -> Iterator[Conflict]:
        if self.confirm is None:
            return
        if self.scheduler == "pbt":
            text = (
                "a trial of pbt changes its configuration while it trains, so there is none to "
                "train again; leave confirm out, or use another scheduler"
            )
            yield Conflict("confirm", text, ("scheduler",))
        most = self.trials or (None if self.searcher == "grid" else DEFAULT_TRIALS)
        if most is not None and self.confirm > most:
            text = f"{self.confirm} is more than the {most} of search.trials; lower it"
            yield Conflict("confirm", text, ("trials", "searcher"))

    def _population_conflicts(self) -> Iterator[Conflict]:
        if self.scheduler != "pbt":
            if self.perturbation_steps is not None:
                text = (
                    "search.perturbation_steps has no effect with search.scheduler "
                    f"{self.scheduler}"
                )
                hint = "leave it out, or set search.scheduler to pbt"
                yield Conflict("perturbation_steps", f"{text}; {hint}", ("scheduler",))
            return
        if self.trials == 1:
            text = "pbt compares trials, and search.trials is 1; raise it, or use another scheduler"
            yield Conflict("scheduler", text, ("trials",))
        rates = self.space.learning_rate
        if self.space.method is not None:
            return
        if isinstance(rates, float) or (isinstance(rates, list) and len(rates) == 1):
            text = (
                "pbt changes the learning rate between the lowest and the highest of the "
                "space, and there is only one"
            )
            hint = "make space.learning_rate a range or a list, or use another scheduler"
            yield Conflict("scheduler", f"{text}; {hint}", ("space.learning_rate",))

    @property
    def proposes(self) -> bool:
        """Tell whether the searcher proposes trials while the search runs."""
        return self.searcher in PROPOSING

    @property
    def ranked_by(self) -> Metric:
        """The metric that ranks trials, with its direction and range."""
        return metric_named(self.metric, self.mode)

    @property
    def better(self) -> Better:
        """The direction in which the metric improves."""
        return self.ranked_by.better
