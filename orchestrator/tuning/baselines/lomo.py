"""LOMO: tunes all weights and stores neither gradients nor optimiser state (Lv et al. 2023).

The update of SGD is fused into the backward pass: as soon as a parameter's gradient is complete,
the parameter is updated and the gradient freed. A step therefore holds the gradient of only one
parameter at a time. The weights keep the model's own number format.

A gradient that is clipped by its norm over all parameters is needed twice: for the norm and for the
update. The paper runs a second backward pass for that, and so does ``fused_update``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orchestrator.tuning.baselines.model_tuning import ModelTuning
from orchestrator.tuning.update_rules import Batch, UpdateRule


class Lomo(ModelTuning):
    """A copy of every parameter in the model's own number format."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, dtype=None)


def fused_update(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    rule: UpdateRule,
    rate: float,
    clip_norm: float | None = None,
) -> bool:
    """Run the loss's backward pass and update each parameter when its gradient is complete.

    ``rule`` must have no state. Returns False, with no parameter changed, if the loss or the norm
    that ``clip_norm`` needs is not finite. If the backward pass fails, the parameters that it had
    reached stay updated.
    """
    scale = 1.0
    if not math.isfinite(float(loss.detach())):
        return False
    if clip_norm is not None:
        norm = _gradient_norm(loss, parameters)
        if not math.isfinite(norm):
            return False
        scale = min(1.0, clip_norm / norm) if norm else 1.0

    def update(parameter: nn.Parameter, gradient: Tensor) -> None:
        if scale < 1:
            gradient.mul_(scale)
        rule.update(Batch([parameter], [gradient], [{}], [rate]))

    with gradients_passed_to(update, parameters):
        loss.backward()
    return True


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Return the norm of the whole gradient; the loss can be differentiated once more."""
    norms: list[Tensor] = []

    def measure(_: nn.Parameter, gradient: Tensor) -> None:
        precise = torch.promote_types(gradient.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(gradient, dtype=precise))

    with gradients_passed_to(measure, parameters):
        loss.backward(retain_graph=True)
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0


@contextmanager
def gradients_passed_to(
    use: Callable[[nn.Parameter, Tensor], None], parameters: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Pass each gradient of a backward pass in the block to ``use``, and free it afterwards.

    ``use`` gets the whole gradient once, also that of a weight that several modules share: autograd
    sums the parts before they reach the parameter. Nodes that read a parameter to compute a part
    have run by then, so that it can be changed in place.
    """

    def pass_on(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        with torch.no_grad():
            use(parameter, parameter.grad)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(pass_on) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
