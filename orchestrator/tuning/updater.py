"""The updates of trials: gradient clipping, scheduled learning rate and optimiser.

``apply_all`` updates many trials at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.job.spec import TrainSpec
from orchestrator.tuning.schedules import factor
from orchestrator.tuning.update_rules import (
    STEP,
    Batch,
    State,
    UpdateRule,
    fresh_state,
    update_rule,
)

PREFIX = "optimizer."


class Updater:
    """One trial's optimiser, schedule and gradient clipping over all the parameters that it trains.

    The only state between steps is the optimiser's, which ``state_tensors`` returns. The schedule
    is a function of the step.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, train: TrainSpec
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.train = train
        self.rule = update_rule(train)
        self.states = [fresh_state(self.rule, param) for param in self.parameters]

    def apply(self, step: int) -> float:
        """Update the parameters for 0-based ``step`` from their ``.grad``, which is set to None.

        Returns the norm of the trial's gradient before clipping. If the norm is not finite, the
        trial has diverged, and neither parameters nor state change. A parameter without a gradient
        is not changed.
        """
        return apply_all([self], [step])[0]

    def live(self) -> Iterator[tuple[nn.Parameter, Tensor, State]]:
        """Yield each parameter that has a gradient, with the gradient and the parameter's state."""
        for param, state in zip(self.parameters, self.states, strict=True):
            if param.grad is not None:
                yield param, param.grad, state

    def fill(self, batch: Batch, step: int, norm: float) -> None:
        """Add the update of ``step`` to a batch, with the gradient clipped by its ``norm``."""
        rate, most = self.learning_rate * factor(self.train, step), self.train.clip_norm
        for param, grad, state in self.live():
            if most is not None and norm > most:
                grad.mul_(most / norm)
            batch.params.append(param)
            batch.grads.append(grad)
            batch.states.append(state)
            batch.rates.append(rate)

    def state_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the optimiser's state as ``optimizer.<name>.<key>``, not copied.

        ``names`` are the parameters' names, in order.
        """
        return {
            f"{PREFIX}{name}.{key}": tensor
            for name, state in zip(names, self.states, strict=True)
            for key, tensor in state.items()
        }

    def load_state_tensors(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Copy the state from tensors that ``state_tensors`` returned.

        Keys that are not the optimiser's are ignored. Raises BadInput when the state is of another
        optimiser, of other parameters or of other shapes.
        """
        own = self.state_tensors(names)
        given = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        self._check(own, given)
        self.states = [
            {key: _own_copy(key, given[f"{PREFIX}{name}.{key}"], param) for key in state}
            for name, state, param in zip(names, self.states, self.parameters, strict=True)
        ]

    def _check(self, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        hint = "resume with the job spec that the checkpoint was written with"
        if own.keys() != given.keys():
            held, needed = (
                ", ".join(sorted(keys)) or "no optimiser state" for keys in (given, own)
            )
            raise BadInput(
                f"this checkpoint holds {held}; "
                f"train.optimizer {self.train.optimizer} needs {needed}",
                hint,
            )
        for key, tensor in own.items():
            if tensor.shape != given[key].shape:
                sizes = f"{list(given[key].shape)}, and this trial's is {list(tensor.shape)}"
                raise BadInput(f"the checkpoint's {key} has the shape {sizes}", hint)


def _own_copy(key: str, tensor: Tensor, param: Tensor) -> Tensor:
    """Copy a state tensor to its device: step counts to the CPU, moments to the parameter's."""
    return tensor.detach().to("cpu" if key == STEP else param.device, copy=True)


@torch.no_grad()
def apply_all(updaters: Sequence[Updater], steps: Sequence[int]) -> list[float]:
    """Apply each updater at its own step and return the norms of their gradients.

    The result is bit for bit the same as that of ``apply`` on one after the other. All trials
    together need one wait for the device and one call per operation.
    """
    norms = _gradient_norms(updaters)
    batches: dict[UpdateRule, Batch] = {}
    for updater, step, norm in zip(updaters, steps, norms, strict=True):
        if math.isfinite(norm):
            updater.fill(batches.setdefault(updater.rule, Batch()), step, norm)
    for rule, batch in batches.items():
        if batch.params:
            rule.update(batch)
    for updater in updaters:
        for param in updater.parameters:
            param.grad = None
    return norms


def _gradient_norms(updaters: Sequence[Updater]) -> list[float]:
    """Compute the Euclidean norm of each trial's gradient over all of its parameters.

    The norm is infinite when a square overflows.
    """
    grads = [[grad for _, grad, _ in updater.live()] for updater in updaters]
    flat = [grad for of_trial in grads for grad in of_trial]
    found = iter(torch.stack(torch._foreach_norm(flat)).tolist() if flat else ())
    return [math.hypot(*(next(found) for _ in of_trial)) for of_trial in grads]
