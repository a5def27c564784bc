"""A packed step: K trials share forwards, with each trial's own loss and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_prompts, small_task, tiny_backbone
from torch import Tensor

from orchestrator.tuning.step import Limits, pack, packed_gradients

SPLIT = small_task().splits["train"]
LENGTHS = [6, 1, 11]
ROWS = [
    [3, 8, 0, 17],
    [3, 5],
    [19, 19, 2, 4, 6, 7, 9],
]  # shared rows, repeated rows, batches of different sizes


def run(
    lengths: list[int],
    rows: list[list[int]],
    limits: Limits = Limits(),
    dtype: torch.dtype = torch.float64,
    prompt_once: bool = True,
    family: str = "llama",
) -> tuple[list[float], list[Tensor]]:
    backbone = tiny_backbone(family, dtype, prompt_once)
    prompts = [random_prompts(backbone, [length], seed=length)[0] for length in lengths]
    losses = packed_gradients(backbone, prompts, rows, SPLIT, limits)
    return losses, [prompt.grad for prompt in prompts if prompt.grad is not None]


def one_by_one(**options: object) -> tuple[list[float], list[Tensor]]:
    found = [run([length], [rows], **options) for length, rows in zip(LENGTHS, ROWS, strict=True)]  # type: ignore[arg-type]
    return [losses[0] for losses, _ in found], [gradients[0] for _, gradients in found]


def assert_equal(
    got: tuple[list[float], list[Tensor]], wanted: tuple[list[float], list[Tensor]], rel: float
) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=rel)
    for one, other in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=rel, atol=rel * float(other.abs().max()))


@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 2e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_alone(
    family: str, dtype: torch.dtype, rel: float, prompt_once: bool
) -> None:
    """Losses and gradients of a packed step equal those of each trial's own step."""
    options = {"dtype": dtype, "prompt_once": prompt_once, "family": family}
    assert_equal(run(LENGTHS, ROWS, **options), one_by_one(**options), rel)


@pytest.mark.parametrize("max_tokens", [1, 30, 100, None])
@pytest.mark.parametrize("overhead", [0, 32, 10_000])
def test_limits_change_nothing(max_tokens: int | None, overhead: int) -> None:
    """Losses and gradients do not depend on the size of forwards, down to one row each."""
    assert_equal(run(LENGTHS, ROWS, Limits(overhead, max_tokens)), one_by_one(), 2e-6)


def test_a_diverged_prompt_touches_no_other() -> None:
    """A NaN, an infinity or a huge value in one trial's prompt affects no other trial."""
    backbone = tiny_backbone()
    wanted = one_by_one()
    for broken, value in enumerate([float("nan"), float("inf"), 1e30]):
        prompts = [random_prompts(backbone, [length], seed=length)[0] for length in LENGTHS]
        prompts[broken].data.fill_(value)
        losses = packed_gradients(backbone, prompts, ROWS, SPLIT)
        rest = [place for place in range(len(LENGTHS)) if place != broken]
        got = [losses[place] for place in rest], [prompts[place].grad for place in rest]
        assert_equal(got, ([wanted[0][p] for p in rest], [wanted[1][p] for p in rest]), 2e-6)  # type: ignore[arg-type]


@given(
    st.lists(
        st.lists(st.integers(0, len(SPLIT) - 1), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
@settings(deadline=None, max_examples=15)
def test_any_rows_pack(rows: list[list[int]]) -> None:
    """A trial's token weights sum to 1; its loss is the mean over its own target tokens."""
    packed = pack(rows, SPLIT)
    for trial in range(len(rows)):
        places = [place for place, owner in enumerate(packed.trial) if owner == trial]
        assert [packed.row[place] for place in places] == rows[trial]
        assert sum(
            packed.weight[place] * len(SPLIT.targets[packed.row[place]]) for place in places
        ) == pytest.approx(1)
    lengths = [1 + trial for trial in range(len(rows))]
    losses, _ = run(lengths, rows)
    for trial, row in enumerate(rows):
        single = [run([lengths[trial]], [[one]])[0][0] for one in row]
        tokens = [len(SPLIT.targets[one]) for one in row]
        mean = sum(loss * count for loss, count in zip(single, tokens, strict=True)) / sum(tokens)
        assert losses[trial] == pytest.approx(mean, rel=1e-5)
