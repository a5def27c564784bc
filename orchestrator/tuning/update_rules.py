"""Update rules over many parameters at once: AdamW, SGD, and Adafactor as in T5X.

A rule updates the parameters of any number of trials together, each with its own learning rate. It
uses torch's foreach operations: one call per operation, rather than one per operation and trial.
They treat each tensor separately, so a trial's update is bit for bit what it would be alone.
torch's fused AdamW is not used, because it rounds differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from orchestrator.job.spec import DEFAULT_BETAS, TrainSpec

State = dict[str, Tensor]
"""One parameter's state: "step" (a float32 scalar on the CPU) and moments of the same shape."""
STEP = "step"

ADAM_EPSILON = 1e-8
DECAY_EXPONENT = 0.8
CLIPPING_THRESHOLD = 1.0
ADAFACTOR_EPSILON = 1e-30


@dataclass
class Batch:
    """Parameters of any number of trials, each with its gradient, state and learning rate."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def moments(self, key: str) -> list[Tensor]:
        """Return each state's tensor under ``key``."""
        return [state[key] for state in self.states]

    def count(self) -> list[float]:
        """Count one more step in each state and return the counts, which start at 1."""
        for state in self.states:
            state[STEP] += 1
        return [float(state[STEP]) for state in self.states]


class UpdateRule(Protocol):
    """A rule that turns gradients into updates."""

    @property
    def keys(self) -> frozenset[str]:
        """Names of the tensors in a parameter's state."""

    def update(self, batch: Batch) -> None:
        """Change parameters and states in place; gradients may be overwritten.

        Must be called with autograd turned off.
        """


def update_rule(train: TrainSpec) -> UpdateRule:
    """Return the update rule of the spec. Rules with the same settings are equal."""
    match train.optimizer:
        case "adamw":
            return AdamW(train.weight_decay, train.betas or DEFAULT_BETAS)
        case "adafactor":
            return Adafactor(train.weight_decay)
        case "sgd":
            return Sgd(train.weight_decay, train.momentum or 0.0)


def fresh_state(rule: UpdateRule, param: Tensor) -> State:
    """Create a parameter's state before the first step: zeros."""
    return {
        key: torch.zeros(()) if key == STEP else torch.zeros_like(param, requires_grad=False)
        for key in sorted(rule.keys)
    }


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019), operation for operation as in ``torch.optim.AdamW``."""

    weight_decay: float
    betas: tuple[float, float]
    keys: ClassVar[frozenset[str]] = frozenset({STEP, "exp_avg", "exp_avg_sq"})

    def update(self, batch: Batch) -> None:
        beta1, beta2 = self.betas
        steps = batch.count()
        mean, square = batch.moments("exp_avg"), batch.moments("exp_avg_sq")
        if self.weight_decay:
            torch._foreach_mul_(
                batch.params, [1 - rate * self.weight_decay for rate in batch.rates]
            )
        torch._foreach_lerp_(mean, batch.grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, batch.grads, batch.grads, 1 - beta2)
        divisor = torch._foreach_sqrt(square)
        torch._foreach_div_(divisor, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(divisor, ADAM_EPSILON)
        sizes = [-rate / (1 - beta1**step) for rate, step in zip(batch.rates, steps, strict=True)]
        torch._foreach_addcdiv_(batch.params, mean, divisor, sizes)


@dataclass(frozen=True)
class Sgd:
    """SGD as in ``torch.optim.SGD``.

    Weight decay is added to the gradient, and momentum has no dampening.
    """

    weight_decay: float
    momentum: float

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({"momentum_buffer"} if self.momentum else ())

    def update(self, batch: Batch) -> None:
        if self.weight_decay:
            torch._foreach_add_(batch.grads, batch.params, alpha=self.weight_decay)
        moves = batch.grads
        if self.momentum:
            moves = batch.moments("momentum_buffer")
            torch._foreach_mul_(moves, self.momentum)
            torch._foreach_add_(moves, batch.grads)
        # A foreach sum takes one factor for all tensors, and multiplying by the rates first would
        # round twice where torch rounds once.
        for param, move, rate in zip(batch.params, moves, batch.rates, strict=True):
            param.add_(move, alpha=-rate)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018) as Lester et al. 2021 use it through T5X.

    The learning rate is fixed. There is no parameter scaling and no momentum. The second moment is
    not factored. The update of each parameter is clipped at RMS 1. Weight decay is subtracted as it
    stands, not multiplied by the learning rate.

    The details follow t5x/adafactor.py and prompt-tuning's t5_1_1_prompt.gin:

    * The epsilon of 1e-30 is added to the squared gradient and nowhere else.
    * T5X factors no matrix with a side below 128. It would factor a longer prompt; this rule never
      does.
    * The second moment's decay is 1 - t^-0.8 with t = 1 + step - step_offset. Their configuration
      leaves the offset at 0 while the steps continue from the backbone's pretraining (about a
      million). Their decay is therefore near 1 from the start, their second moment is a slowly
      growing sum, and the clipping determines the size of the update. Here t is 1 at a trial's
      first step, as in the paper's algorithm.
    """

    weight_decay: float
    keys: ClassVar[frozenset[str]] = frozenset({STEP, "second_moment"})

    def update(self, batch: Batch) -> None:
        fading = [step**-DECAY_EXPONENT for step in batch.count()]
        moment = batch.moments("second_moment")
        squares = torch._foreach_mul(batch.grads, batch.grads)
        torch._foreach_add_(squares, ADAFACTOR_EPSILON)
        torch._foreach_mul_(squares, fading)
        torch._foreach_mul_(moment, [1.0 - part for part in fading])
        torch._foreach_add_(moment, squares)
        moves = torch._foreach_rsqrt(moment)
        torch._foreach_mul_(moves, batch.grads)
        excess = torch._foreach_norm(moves)  # becomes root mean square / threshold
        torch._foreach_div_(
            excess, [math.sqrt(move.numel()) * CLIPPING_THRESHOLD for move in moves]
        )
        torch._foreach_clamp_min_(excess, 1.0)
        torch._foreach_div_(moves, excess)
        torch._foreach_mul_(moves, batch.rates)
        if self.weight_decay:
            torch._foreach_mul_(batch.params, 1.0 - self.weight_decay)
        torch._foreach_sub_(batch.params, moves)
