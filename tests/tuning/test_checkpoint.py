"""Checkpoints: kilobytes without pickle, whole or refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.errors import BadInput
from orchestrator.spec import TrainSpec
from orchestrator.tuning.checkpoint import TrialState, optimizer_tensors, restore_optimizer
from orchestrator.tuning.optimizers import make_optimizer


def state(optimizer: str = "adamw") -> TrialState:
    parameter = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    made = make_optimizer([parameter], 0.1, TrainSpec(optimizer=optimizer))
    for _ in range(3):
        parameter.grad = parameter.detach() * 0.5 + 1
        made.step()
    tensors = {"prompt": parameter.data, "best": parameter.data * 2, **optimizer_tensors(made, parameter)}
    return TrialState(6, 4, {"accuracy": 0.75, "loss": 1.25}, 1, tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_round_trip(optimizer: str) -> None:
    """Every field and every tensor comes back as it was, to the bit and of the same type."""
    before = state(optimizer)
    after = TrialState.from_bytes(before.to_bytes())
    assert after == before and after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor) and after.tensors[name].dtype == tensor.dtype
    assert TrialState.from_bytes(after.to_bytes()).to_bytes() == before.to_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_restored_optimizer_goes_on(optimizer: str) -> None:
    """After restoring, the next update is the one that the first optimiser would have made."""
    train = TrainSpec(optimizer=optimizer, weight_decay=0.01)
    first = nn.Parameter(torch.ones(2, 3))
    one = make_optimizer([first], 0.1, train)
    for step in range(4):
        first.grad = torch.full((2, 3), 1.0 + step)
        one.step()
        if step == 1:
            other = nn.Parameter(first.detach().clone())
            two = make_optimizer([other], 0.1, train)
            saved = TrialState(0, 0, {}, 0, {"prompt": first.data, **optimizer_tensors(one, first)})
            restore_optimizer(two, other, TrialState.from_bytes(saved.to_bytes()).tensors)
    for step in range(2, 4):
        other.grad = torch.full((2, 3), 1.0 + step)
        two.step()
    assert torch.equal(first, other)


def test_before_the_first_step_there_is_nothing_to_restore() -> None:
    """An optimiser that has not stepped has no tensors, and restoring none leaves it fresh."""
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = make_optimizer([parameter], 0.1, TrainSpec())
    assert optimizer_tensors(optimizer, parameter) == {}
    restore_optimizer(optimizer, parameter, {"prompt": parameter.data})
    assert parameter not in optimizer.state


def test_it_is_a_safetensors_document_and_nothing_else() -> None:
    """Eight bytes of length, a JSON header, and exactly the bytes that its tensors need: no room for a pickle."""
    data = state().to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert set(metadata) == {"state"}
    assert set(json.loads(metadata["state"])) == {"step", "best_step", "best_metrics", "waited"}
    assert 8 + size + max(entry["data_offsets"][1] for entry in header.values()) == len(data)
    assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) == len(data) - 8 - size
    assert len(data) < 2000


def test_cut_short_is_refused_wherever_it_is_cut() -> None:
    """Every beginning of a checkpoint, and one with something behind it, is bad input with the way on."""
    data = state().to_bytes()
    for length in range(len(data)):
        with pytest.raises(BadInput, match=r"can't be read(.|\n)*resume from an earlier one"):
            TrialState.from_bytes(data[:length])
    with pytest.raises(BadInput):
        TrialState.from_bytes(data + b"x")


@given(st.binary(max_size=64))
def test_other_bytes_are_refused(data: bytes) -> None:
    """Bytes that are no checkpoint are bad input, never another error."""
    with pytest.raises(BadInput):
        TrialState.from_bytes(data)


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"__metadata__": 1}', b'{"__metadata__": {"state": "[]"}}', b"{}"])
def test_other_documents_are_refused(header: bytes) -> None:
    """JSON of another shape is bad input too."""
    with pytest.raises(BadInput):
        TrialState.from_bytes(len(header).to_bytes(8, "little") + header)
