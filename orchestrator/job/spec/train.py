"""The section ``train``: how one trial is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from orchestrator.job.spec.base import Conflict, Decay, Label, PositiveFloat, PositiveInt, Section

DEFAULT_BETAS = (0.9, 0.999)  # torch's own
Betas: TypeAlias = Annotated[tuple[Decay, Decay], Field(strict=False, examples=[DEFAULT_BETAS])]
ClassWeights: TypeAlias = (
    Literal["balanced"] | Annotated[dict[Label, PositiveFloat], Field(min_length=1)]
)
Optimizer: TypeAlias = Literal["adamw", "adafactor", "sgd"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine", "exponential"]


class TrainSpec(Section):
    """Settings for the training of one trial."""

    steps: PositiveInt = 500
    """Maximum number of optimiser steps of a trial."""
    batch_size: PositiveInt = 16
    """Number of rows in a step of one trial."""
    micro_batch_size: PositiveInt | None = None
    """Maximum number of rows of one forward pass; all rows of a step by default. Gradients
    accumulate over the passes, so memory use shrinks and the result stays the same. Method lomo
    stores no gradients and can't use it."""
    evaluate_every: PositiveInt = 50
    """Steps between two evaluations. Each evaluation reports metrics and a checkpoint."""
    loss_reduction: Literal["token_mean", "sum_per_row", "sum"] = "token_mean"
    """Combination of a batch's token losses into one. token_mean takes their mean, sum_per_row the
    mean over rows of each row's sum (as in prefix tuning), and sum their sum (as in T5X). The
    choice matters for sgd and clip_norm; adamw and adafactor rescale gradients themselves."""
    class_weights: ClassWeights | None = None
    """Weights of the training rows in the loss, by their label: balanced, or a mapping of labels to
    weights (1 for a label that it does not name). balanced gives all labels the same total weight
    over the training rows, as scikit-learn does. The mean of loss_reduction is a weighted one: the
    sum is divided by the weights of the batch's tokens (token_mean) or rows (sum_per_row). The
    loss of validation and test is not weighted."""
    optimizer: Optimizer = "adamw"
    """Optimiser of the soft prompt, or of what a baseline trains: adamw, adafactor (as in T5X) or
    sgd. Method lomo needs sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Fraction of the prompt that each step subtracts: multiplied by the learning rate with adamw,
    unscaled with adafactor (as in T5X). sgd adds that fraction of the prompt to the gradient
    instead."""
    betas: Betas | None = None
    """Decay rates of adamw's first and second moment; [0.9, 0.999] by default."""
    momentum: Decay | None = None
    """Momentum of sgd; none by default."""
    clip_norm: PositiveFloat | None = None
    """Maximum gradient norm of a trial: the Euclidean norm over everything that it trains. Longer
    gradients are scaled down. Method lomo then runs the backward pass twice in a step: first for
    the norm, then for the update."""
    schedule: Schedule = "constant"
    """Course of the learning rate after the warmup. constant keeps it, linear and cosine reach 0
    after the last step, and exponential multiplies it by decay_rate after every decay_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps in which the learning rate rises linearly from 0 to its peak."""
    decay_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Factor by which schedule exponential multiplies the learning rate after every decay_steps."""
    decay_steps: PositiveInt | None = None
    """Number of steps between two decays of schedule exponential."""
    frozen_dropout: bool = False
    """Keep the frozen model's own dropout active in training steps (published recipes differ)."""
    patience: PositiveInt | None = None
    """Stop a trial after this many evaluations without a better validation metric."""

    def _conflicts(self) -> Iterator[Conflict]:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            text = (
                f"{self.micro_batch_size} is more than train.batch_size {self.batch_size}: a "
                "step has no more rows"
            )
            yield Conflict("micro_batch_size", f"{text}; lower it or leave it out", ("batch_size",))
        if self.warmup_steps >= self.steps:
            text = (
                f"{self.warmup_steps} is not below train.steps {self.steps}: no trial would "
                "reach its learning rate"
            )
            yield Conflict("warmup_steps", f"{text}; lower it", ("steps",))
        yield from self._only_with("betas", "optimizer", "adamw")
        yield from self._only_with("momentum", "optimizer", "sgd")
        for name in ("decay_rate", "decay_steps"):
            yield from self._only_with(name, "schedule", "exponential")
            if self.schedule == "exponential" and getattr(self, name) is None:
                yield Conflict("schedule", f"exponential needs train.{name}; add it", (name,))

    def _only_with(self, name: str, switch: str, value: str) -> Iterator[Conflict]:
        """Yield a conflict if ``name`` is set but has no effect, as ``switch`` is not ``value``."""
        setting = getattr(self, switch)
        if getattr(self, name) is not None and setting != value:
            text = f"train.{name} has no effect with train.{switch} {setting}"
            yield Conflict(
                name, f"{text}; leave it out, or set train.{switch} to {value}", (switch,)
            )
