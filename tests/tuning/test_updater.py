"""Updaters: clipping, scheduled rates, restored state, and many trials in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.job.spec import Optimizer, Schedule, TrainSpec
from orchestrator.tuning.schedules import factor
from orchestrator.tuning.updater import Updater, apply_all

NAMES = ["prompt", "mlp.0.weight", "mlp.0.bias"]
SHAPES = [(5, 8), (8, 8), (8,)]
STEPS = 12
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "betas": (0.8, 0.95)},
    {"optimizer": "adafactor"},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
]
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "constant"},
    {"schedule": "linear", "warmup_steps": 3},
    {"schedule": "cosine"},
    {"schedule": "exponential", "decay_rate": 0.8, "decay_steps": 2, "warmup_steps": 1},
]
each_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=["adamw", "adafactor", "sgd", "sgd with momentum"]
)
each_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda schedule: schedule["schedule"]
)


def test_every_optimiser_and_schedule_is_tested() -> None:
    """The settings of this file's tests hold each name that the job spec allows."""
    assert {train["optimizer"] for train in OPTIMIZERS} == {*get_args(Optimizer)}
    assert {train["schedule"] for train in SCHEDULES} == {*get_args(Schedule)}


def spec(**values: Any) -> TrainSpec:
    return TrainSpec.model_validate({"steps": STEPS, "weight_decay": 0.01, **values})


def parameters(seed: int = 0, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]


def give_gradients(updater: Updater, step: int, size: float = 1.0) -> None:
    """Set gradients that depend on the step and on the parameters, as a loss's gradients do."""
    random = torch.Generator().manual_seed(100 + step)
    for param in updater.parameters:
        param.grad = size * (param.detach() + torch.randn(param.shape, generator=random))


def train_steps(updater: Updater, first: int, last: int, size: float = 1.0) -> list[float]:
    norms = []
    for step in range(first, last):
        give_gradients(updater, step, size)
        norms.append(updater.apply(step))
    return norms


def assert_equal(ours: Updater, others: Updater) -> None:
    """Compare parameters and state bit for bit."""
    for param, other in zip(ours.parameters, others.parameters, strict=True):
        assert torch.equal(param, other)
    state, wanted = ours.state_tensors(NAMES), others.state_tensors(NAMES)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@each_optimizer
@each_schedule
@pytest.mark.parametrize("clip_norm", [None, 5.0])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_restored_trial_goes_on_to_the_bit(
    optimizer: dict[str, Any], schedule: dict[str, Any], clip_norm: float | None, cut: int
) -> None:
    """A new updater restored from a safetensors checkpoint goes on as without interruption."""
    train = spec(clip_norm=clip_norm, **optimizer, **schedule)
    whole = Updater(parameters(), 0.3, train)
    train_steps(whole, 0, STEPS)

    first = Updater(parameters(), 0.3, train)
    train_steps(first, 0, cut)
    saved = save(
        {
            **dict(zip(NAMES, (p.data for p in first.parameters), strict=True)),
            **first.state_tensors(NAMES),
        }
    )
    tensors = load(saved)
    second = Updater([nn.Parameter(tensors[name]) for name in NAMES], 0.3, train)
    second.load_state_tensors(NAMES, tensors)
    train_steps(second, cut, STEPS)
    assert_equal(second, whole)


@each_optimizer
@each_schedule
def test_it_is_a_plain_loop_with_torchs_parts(
    optimizer: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """An updater equals clip_grad_norm_, a scheduled rate and a torch optimizer, in that order."""
    train = spec(clip_norm=6.0, **optimizer, **schedule)
    updater, params = Updater(parameters(), 0.3, train), parameters()
    made = plain_optimizer(params, train)
    for step in range(STEPS):
        give_gradients(updater, step)
        for param, ours in zip(params, updater.parameters, strict=True):
            assert ours.grad is not None
            param.grad = ours.grad.clone()
        norm = float(nn.utils.clip_grad_norm_(params, 6.0))
        made.param_groups[0]["lr"] = 0.3 * factor(train, step)
        made.step()
        assert updater.apply(step) == pytest.approx(norm, rel=1e-6)
        for param, ours in zip(params, updater.parameters, strict=True):
            torch.testing.assert_close(ours.data, param.data, rtol=1e-4, atol=1e-5)


def plain_optimizer(params: list[nn.Parameter], train: TrainSpec) -> torch.optim.Optimizer:
    if train.optimizer == "adamw":
        assert train.betas is not None
        return torch.optim.AdamW(params, lr=1.0, betas=train.betas, weight_decay=train.weight_decay)
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=1.0, momentum=train.momentum or 0.0, weight_decay=train.weight_decay
        )
    return PlainAdafactor(params, {"lr": 1.0, "weight_decay": train.weight_decay})


class PlainAdafactor(torch.optim.Optimizer):
    """Adafactor for one parameter at a time, written without foreach."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for param in group["params"]:
            state = self.state[param]
            state["t"] = state.get("t", 0) + 1
            share = state["t"] ** -0.8
            state["v"] = (1 - share) * state.get("v", 0) + share * (param.grad**2 + 1e-30)
            update = param.grad / state["v"].sqrt()
            update /= update.square().mean().sqrt().clamp(min=1)
            param.copy_((1 - group["weight_decay"]) * param - group["lr"] * update)


@pytest.mark.parametrize("clip_norm", [0.5, 40.0])
def test_the_norm_is_that_of_all_parameters_together(clip_norm: float) -> None:
    """apply returns the norm of all gradients before clipping.

    A longer gradient is scaled to clip_norm and keeps its direction.
    """
    updater = Updater(
        parameters(), 1.0, spec(optimizer="sgd", weight_decay=0.0, clip_norm=clip_norm)
    )
    before = [param.detach().clone() for param in updater.parameters]
    give_gradients(updater, 0)
    gradient = torch.cat([given(param).flatten() for param in updater.parameters])
    norm = updater.apply(0)
    moved = torch.cat(
        [(b - p.detach()).flatten() for b, p in zip(before, updater.parameters, strict=True)]
    )
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-6) and 0.5 < norm < 40.0
    assert float(moved.norm()) == pytest.approx(min(norm, clip_norm), rel=1e-5)
    torch.testing.assert_close(
        moved / moved.norm(), gradient / gradient.norm(), rtol=1e-4, atol=1e-6
    )


def given(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


@each_optimizer
def test_the_gradient_is_used_up(optimizer: dict[str, Any]) -> None:
    """A step clears the gradients, so that the next step can't add to them."""
    updater = Updater(parameters(), 0.1, spec(**optimizer))
    train_steps(updater, 0, 1)
    assert [param.grad for param in updater.parameters] == [None, None, None]


@each_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    optimizer: dict[str, Any], bad: float
) -> None:
    """A gradient that is not finite gives a norm that is not finite.

    Parameters and state stay as before the step, and the gradient is cleared.
    """
    updater = Updater(parameters(), 0.1, spec(clip_norm=1.0, **optimizer))
    train_steps(updater, 0, 2)
    before = copy.deepcopy(updater)
    give_gradients(updater, 2)
    given(updater.parameters[1])[0, 0] = bad
    assert not math.isfinite(updater.apply(2))
    assert_equal(updater, before)
    assert updater.parameters[0].grad is None


@each_optimizer
def test_a_parameter_without_a_gradient_stays(optimizer: dict[str, Any]) -> None:
    """A parameter without a gradient is neither moved nor decayed, and its state is unchanged."""
    updater = Updater(parameters(), 0.1, spec(**optimizer))
    before = copy.deepcopy(updater)
    give_gradients(updater, 0)
    updater.parameters[2].grad = None
    updater.apply(0)
    assert torch.equal(updater.parameters[2], before.parameters[2])
    assert not torch.equal(updater.parameters[0], before.parameters[0])
    for key, tensor in before.states[2].items():
        assert torch.equal(updater.states[2][key], tensor)


def test_without_any_gradient_nothing_happens() -> None:
    """A trial without any gradient has the norm 0, alone and beside others."""
    idle, busy = Updater(parameters(), 0.1, spec()), Updater(parameters(1), 0.1, spec())
    before = copy.deepcopy(idle)
    assert idle.apply(0) == 0.0
    give_gradients(busy, 0)
    assert apply_all([idle, busy], [0, 0])[0] == 0.0
    assert_equal(idle, before)
    assert apply_all([], []) == []


@each_optimizer
def test_together_is_one_by_one_to_the_bit(optimizer: dict[str, Any]) -> None:
    """A joint update equals single updates, bit for bit.

    The trials differ in size, rate and step; one is clipped and one has diverged.
    """
    train = spec(clip_norm=8.0, schedule="linear", **optimizer)
    shapes: list[list[tuple[int, ...]]] = [SHAPES, [(1, 8)], [(20, 8)], [(3, 8), (8, 2)]]
    together = [
        Updater(parameters(seed, shape), 0.1 * (1 + seed), train)
        for seed, shape in enumerate(shapes)
    ]
    alone = copy.deepcopy(together)
    for now in range(5):
        steps = [now, now + 4, now, now + 1]
        for updaters in (together, alone):
            for updater, step in zip(updaters, steps, strict=True):
                give_gradients(updater, step)
            if now == 3:
                given(updaters[2].parameters[0])[:] = math.inf
        norms = apply_all(together, steps)
        assert norms == [updater.apply(step) for updater, step in zip(alone, steps, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters, other.parameters, strict=True))


def test_trials_of_different_optimizers_share_a_call() -> None:
    """Each trial is updated by its own rule."""
    together = [Updater(parameters(), 0.1, spec(**optimizer)) for optimizer in OPTIMIZERS]
    alone = copy.deepcopy(together)
    for updater in (*together, *alone):
        give_gradients(updater, 0)
    apply_all(together, [0] * len(together))
    for one, other in zip(together, alone, strict=True):
        other.apply(0)
        assert_equal(one, other)


@each_optimizer
def test_the_state_has_flat_names(optimizer: dict[str, Any]) -> None:
    """Each tensor's key names its parameter; moments have their parameter's shape."""
    updater = Updater(parameters(), 0.1, spec(**optimizer))
    tensors = updater.state_tensors(NAMES)
    assert set(tensors) == {
        f"optimizer.{name}.{key}" for name in NAMES for key in updater.rule.keys
    }
    for name, shape in zip(NAMES, SHAPES, strict=True):
        for key in updater.rule.keys - {"step"}:
            assert tensors[f"optimizer.{name}.{key}"].shape == shape


def test_loading_copies_and_leaves_other_tensors_alone() -> None:
    """Loading copies the tensors, so that further steps do not change them.

    The prompt's own tensors are ignored.
    """
    first = Updater(parameters(), 0.1, spec())
    train_steps(first, 0, 2)
    tensors = {name: tensor.clone() for name, tensor in first.state_tensors(NAMES).items()}
    kept = copy.deepcopy(tensors)
    second = Updater(parameters(), 0.1, spec())
    second.load_state_tensors(NAMES, {"prompt": torch.ones(2), "best": torch.ones(2), **tensors})
    train_steps(second, 2, 4)
    assert all(torch.equal(tensors[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    ("written", "read"),
    [("adamw", "adafactor"), ("adafactor", "adamw"), ("adamw", "sgd"), ("sgd", "adamw")],
)
def test_another_optimizers_state_is_refused(written: str, read: str) -> None:
    """A checkpoint of another optimizer is BadInput.

    The message names what it holds, what is needed, and how to go on.
    """
    tensors = Updater(parameters(), 0.1, spec(optimizer=written)).state_tensors(NAMES)
    with pytest.raises(
        BadInput, match=rf"checkpoint holds (.|\n)*train.optimizer {read} needs (.|\n)*next: resume"
    ):
        Updater(parameters(), 0.1, spec(optimizer=read)).load_state_tensors(NAMES, tensors)


def test_another_trials_state_is_refused() -> None:
    """State of other, too few or differently shaped parameters is BadInput.

    Nothing of it is loaded.
    """
    updater = Updater(parameters(), 0.1, spec())
    tensors = updater.state_tensors(NAMES)
    before = copy.deepcopy(updater)
    missing = {key: tensor for key, tensor in tensors.items() if "bias" not in key}
    more = tensors | {"optimizer.other.step": torch.zeros(())}
    for bad in (missing, more, {}):
        with pytest.raises(BadInput, match=r"needs optimizer\.mlp\.0\.bias\.exp_avg"):
            updater.load_state_tensors(NAMES, bad)
    longer = tensors | {"optimizer.prompt.exp_avg": torch.zeros(6, 8)}
    with pytest.raises(BadInput, match=r"optimizer\.prompt\.exp_avg has the shape \[6, 8\]"):
        updater.load_state_tensors(NAMES, longer)
    assert_equal(updater, before)
