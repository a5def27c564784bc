"""Checkpoints: small, without pickle, and refused when damaged."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.errors import BadInput
from orchestrator.job.spec import TrainSpec
from orchestrator.tuning.checkpoint import Checkpoint, restore_prompt
from orchestrator.tuning.prompts.prefix import DirectSite, Prefix
from orchestrator.tuning.prompts.soft import SoftPrompt
from orchestrator.tuning.updater import Updater


def state(optimizer: str = "adamw") -> Checkpoint:
    parameter = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    made = Updater([parameter], 0.1, TrainSpec(optimizer=optimizer))
    for step in range(3):
        parameter.grad = parameter.detach() * 0.5 + 1
        made.apply(step)
    return Checkpoint.of(
        step=6,
        best_step=4,
        best_metrics={"accuracy": 0.75, "loss": 1.25},
        waited=1,
        base_model="f00d",
        prompt={"prompt": parameter.data},
        best={"prompt": parameter.data * 2},
        optimizer=made.state_tensors(["prompt"]),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_round_trip(optimizer: str) -> None:
    """Every field and tensor is read back exactly, with its type."""
    before = state(optimizer)
    after = Checkpoint.from_bytes(before.to_bytes())
    assert after == before and after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert (
            torch.equal(after.tensors[name], tensor) and after.tensors[name].dtype == tensor.dtype
        )
    assert Checkpoint.from_bytes(after.to_bytes()).to_bytes() == before.to_bytes()


def test_its_parts_come_apart_again() -> None:
    """The prompt, the best prompt and the optimizer's state stay apart, whatever their names."""
    made = state()
    assert set(made.prompt()) == set(made.best()) == {"prompt"}
    assert torch.equal(made.best()["prompt"], made.prompt()["prompt"] * 2)
    assert {name for name in made.tensors if name.startswith("optimizer.prompt.")}


def test_a_view_is_written_as_it_looks() -> None:
    """Tensors that share memory are stored separately."""
    whole = torch.arange(12.0).view(3, 4)
    made = Checkpoint.of(
        step=0,
        best_step=0,
        best_metrics={},
        waited=0,
        base_model="",
        prompt={"a": whole},
        best={"b": whole[1:]},
        optimizer={},
    )
    after = Checkpoint.from_bytes(made.to_bytes())
    assert torch.equal(after.prompt()["a"], whole) and torch.equal(after.best()["b"], whole[1:])


def test_another_prompts_state_is_refused() -> None:
    """State of another method or of another length is refused with a message that says so."""
    start = SoftPrompt(torch.zeros(3, 4))
    restore_prompt(start, state(), "f00d")
    assert torch.equal(start.prompt.detach(), state().prompt()["prompt"])
    for other in (
        SoftPrompt(torch.zeros(5, 4)),
        Prefix({"decoder": DirectSite(torch.zeros(2, 2, 1, 3, 4))}),
    ):
        with pytest.raises(BadInput, match="of another prompt"):
            restore_prompt(other, state(), "f00d")


def test_another_base_models_state_is_refused() -> None:
    """State of another base model is refused; the message has both fingerprints."""
    with pytest.raises(BadInput, match=r"another base model \(fingerprint f00d\)(.|\n)*\(beef\)"):
        restore_prompt(SoftPrompt(torch.zeros(3, 4)), state(), "beef")


def test_a_state_that_is_not_finite_is_refused() -> None:
    """A diverged trial's checkpoint can be read, but not resumed from."""
    ruined = state()
    ruined.tensors["prompt.prompt"][1, 1] = torch.nan
    with pytest.raises(BadInput, match="prompt holds values that are not finite"):
        restore_prompt(
            SoftPrompt(torch.zeros(3, 4)), Checkpoint.from_bytes(ruined.to_bytes()), "f00d"
        )


def test_it_is_a_safetensors_document_and_nothing_else() -> None:
    """A checkpoint is eight bytes of length, a JSON header and its tensors' bytes.

    Nothing is left over in which a pickle could hide.
    """
    data = state().to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert set(metadata) == {"state"}
    assert set(json.loads(metadata["state"])) == {
        "step",
        "best_step",
        "best_metrics",
        "waited",
        "base_model",
    }
    assert 8 + size + max(entry["data_offsets"][1] for entry in header.values()) == len(data)
    assert (
        sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        == len(data) - 8 - size
    )
    assert len(data) < 2000


def test_cut_short_is_refused_wherever_it_is_cut() -> None:
    """Every truncated checkpoint is BadInput that says how to go on; so is one with extra bytes."""
    data = state().to_bytes()
    for length in range(len(data)):
        with pytest.raises(BadInput, match=r"can't be read(.|\n)*resume from an earlier one"):
            Checkpoint.from_bytes(data[:length])
    with pytest.raises(BadInput):
        Checkpoint.from_bytes(data + b"x")


@given(st.binary(max_size=64))
def test_other_bytes_are_refused(data: bytes) -> None:
    """Bytes that are no checkpoint are BadInput, never another error."""
    with pytest.raises(BadInput):
        Checkpoint.from_bytes(data)


@pytest.mark.parametrize(
    "header", [b"[]", b"3", b'{"__metadata__": 1}', b'{"__metadata__": {"state": "[]"}}', b"{}"]
)
def test_other_documents_are_refused(header: bytes) -> None:
    """A header of another shape is BadInput too."""
    with pytest.raises(BadInput):
        Checkpoint.from_bytes(len(header).to_bytes(8, "little") + header)
