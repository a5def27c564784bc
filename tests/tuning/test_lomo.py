"""LOMO makes the updates of SGD and holds one gradient at a time."""

from __future__ import annotations

import math

import pytest
import torch
from models import VERBALIZERS, backbone_of, text_rows, tokenizer_of
from torch import Tensor, nn

from orchestrator.data.batches import step_rows
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.backbone import Backbone
from orchestrator.tuning import step as step_module
from orchestrator.tuning.baselines import make_change
from orchestrator.tuning.baselines.lomo import fused_update, gradients_passed_to
from orchestrator.tuning.engine import Engine, Slot, Task
from orchestrator.tuning.make import make_engine
from orchestrator.tuning.prompts import Method
from orchestrator.tuning.update_rules import Sgd

STEPS = 20
SPEC = TrialSpec("", None, 0, 0.005, 3)
FAMILIES = ("llama", "gpt2", "t5", "bart", "bert")
"""Causal, seq2seq and masked models, all of which share the embedding with the last layer."""
SETTINGS = {
    "plain": TrainSpec(steps=STEPS, batch_size=6, evaluate_every=STEPS, optimizer="sgd"),
    "clipped and decayed": TrainSpec(
        steps=STEPS, batch_size=6, evaluate_every=STEPS, optimizer="sgd", clip_norm=0.5,
        weight_decay=0.1,
    ),
}  # fmt: skip
PLAIN = SETTINGS["plain"]


def rows_of(family: str, backbone: Backbone) -> tuple[Encoder, Encoded]:
    texts = VERBALIZERS["several tokens"]
    verbalizer = Verbalizer(tuple(texts), tuple(texts.values()))
    tokenizer = tokenizer_of(family)
    template = Template("{text}\nspam?")
    encoder = Encoder(tokenizer, template, verbalizer, 40, 32, backbone.family)
    return encoder, encoder.encode(text_rows(16, 1), "label")


def seated(
    family: str,
    train: TrainSpec = PLAIN,
    backbone: Backbone | None = None,
    spec: TrialSpec = SPEC,
    cores: int = 1,
) -> tuple[Engine, Slot]:
    """Return an engine with one trial of LOMO, and the trial's slot."""
    backbone = backbone or backbone_of(family, torch.float32)
    encoder, rows = rows_of(family, backbone)
    task = Task(encoder, {"train": rows, "validation": rows}, method=Method("lomo"))
    engine = make_engine(backbone, task, train, SearchSpec(metric="loss"), 1, cores=cores)
    engine.seat("t", spec)
    return engine, engine.slots["t"]


def weights_of_torch(family: str, train: TrainSpec, backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights after the same steps of ``torch.optim.SGD``, from stored gradients."""
    _, split = rows_of(family, backbone)
    change = make_change("lomo", SPEC, backbone)
    parameters = list(change.parameters())
    optimizer = torch.optim.SGD(parameters, SPEC.learning_rate, weight_decay=train.weight_decay)
    for step in range(train.steps):
        numbers = step_rows(len(split), train.batch_size, SPEC.seed, step)
        inputs = [split.inputs[number] for number in numbers]
        answers = [split.targets[number] for number in numbers]
        with change.applied():
            logits, targets = backbone.teacher_forced(None, inputs, answers, [0] * len(numbers))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
        if train.clip_norm is not None:
            # Without the 1e-6 that torch's clipping adds to the norm.
            gradients = [weight.grad for weight in parameters if weight.grad is not None]
            scale = train.clip_norm / nn.utils.get_total_norm(gradients)
            for gradient in gradients:
                gradient.mul_(scale.clamp(max=1))
        optimizer.step()
        optimizer.zero_grad()
    return change.named()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_after_20_steps_are_those_of_sgd(family: str, setting: str) -> None:
    """They equal those of torch's SGD up to rounding, tied weights included."""
    train, backbone = SETTINGS[setting], backbone_of(family, torch.float64)
    assert tied_weights(backbone)
    engine, slot = seated(family, train, backbone)
    start = {name: tensor.clone() for name, tensor in slot.prompt.named().items()}
    engine.round()
    wanted = weights_of_torch(family, train, backbone)
    assert wanted.keys() == start.keys()
    for name, tensor in slot.prompt.named().items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-5, atol=1e-6), name
    moved = sum(bool((tensor != start[name]).any()) for name, tensor in wanted.items())
    assert moved > 0.7 * len(start)


def tied_weights(backbone: Backbone) -> list[str]:
    """Return the names of parameters that more than one module holds."""
    holders: dict[int, list[str]] = {}
    for name, parameter in backbone.model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    return [names[0] for names in holders.values() if len(names) > 1]


def test_weights_keep_the_models_number_format() -> None:
    """A bfloat16 model is tuned in bfloat16, as torch's SGD would, and stored at its own size."""
    backbone = backbone_of("llama", torch.bfloat16)
    engine, slot = seated("llama", backbone=backbone)
    (report,) = engine.round()
    wanted = weights_of_torch("llama", PLAIN, backbone)
    for name, tensor in slot.prompt.named().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=0.02, atol=0.02), name
    assert report.costs.stored_bytes == 2 * report.costs.parameters


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_gradient_is_held_at_a_time(setting: str) -> None:
    """While the backward pass runs, one parameter has a gradient; after the step, none has.

    The optimiser has no state, and the trial's checkpoint holds none.
    """
    train = SETTINGS[setting]
    engine, slot = seated("gpt2", train)
    parameters = list(slot.prompt.parameters())
    held: list[int] = []

    def count(_: Tensor) -> None:
        held.append(sum(parameter.grad is not None for parameter in parameters))

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters]
    engine.step([slot])
    for handle in handles:
        handle.remove()
    passes = 1 if train.clip_norm is None else 2
    assert set(held) == {1} and len(held) == passes * len(parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(slot.updater.states)
    assert not any(name.startswith("optimizer.") for name in slot.state().tensors)


def test_no_hook_stays_on_a_weight() -> None:
    """After a step, a backward pass leaves gradients and changes no weight."""
    engine, slot = seated("llama")
    engine.step([slot])
    parameter = next(slot.prompt.parameters())
    before = parameter.detach().clone()
    parameter.sum().backward()
    assert parameter.grad is not None and torch.equal(parameter, before)


def test_a_shared_weight_is_updated_once_with_its_whole_gradient() -> None:
    """A weight that is read twice gets the sum of both gradients in one call."""
    weight = nn.Parameter(torch.tensor([2.0]))
    seen: list[float] = []
    with gradients_passed_to(lambda _, gradient: seen.append(float(gradient)), [weight]):
        (weight * weight * 3).sum().backward()
    assert seen == [12.0] and weight.grad is None


@pytest.mark.parametrize("loss_is", [math.inf, 0.0], ids=["loss", "gradient"])
def test_what_is_not_finite_changes_no_weight(loss_is: float) -> None:
    """A loss that is not finite, or a gradient to be clipped, leaves the weights as they are."""
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))]
    loss = weights[0].sum() * 0 + weights[1].sqrt().sum()  # its gradient is infinite
    loss = loss + (loss_is if loss_is else 0)
    assert not fused_update(loss, weights, Sgd(0.0, 0.0), 0.1, clip_norm=1.0)
    assert torch.equal(weights[0], torch.ones(2)) and torch.equal(weights[1], torch.zeros(2))
    assert weights[0].grad is None and weights[1].grad is None


def test_a_trial_whose_rate_is_too_high_ends_as_diverged() -> None:
    """Weights that overflow end the trial; the model itself is unchanged."""
    spec = TrialSpec("", None, 0, 1e30, 3)
    engine, _ = seated("llama", spec=spec)
    before = engine.backbone.digest()
    (report,) = engine.round()
    assert report.ending == "diverged" and engine.backbone.digest() == before


def test_rows_of_a_step_run_in_one_forward_on_all_cores() -> None:
    """With two cores the weights are those of one core, since rows are not divided."""
    one, two = seated("llama"), seated("llama", cores=2)
    for engine, _ in (one, two):
        engine.round()
    wanted = one[1].prompt.named()
    for name, tensor in two[1].prompt.named().items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-4, atol=1e-5), name


def test_a_step_without_memory_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial ends, since the update of a step that broke off may have been made in part."""
    tries: list[int] = []

    def fail(*_: object) -> Tensor:
        tries.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(step_module, "target_log_probs", fail)
    engine, _ = seated("llama")
    (report,) = engine.round()
    assert report.ending == "no_room" and len(tries) == 1
