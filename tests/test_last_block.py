"""The last block only computes columns that are read; test_backbone.py checks the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from models import random_ids, random_prompts, tiny_backbone
from torch import Tensor, nn

from orchestrator.models.backbone import PROMPT_ONCE_FAMILIES, Backbone, CausalBackbone
from orchestrator.models.backbone.attention import grouped_attention
from orchestrator.models.backbone.last_block import reading, watch
from orchestrator.models.backbone.sharding import blocks_of

INPUTS = random_ids([9, 1, 4, 14, 4, 7])
TARGETS = random_ids([3, 2, 1, 4, 2, 3], seed=1)
OWNER = [0, 1, 0, 1, 0, 1]
FED = 17  # columns of the longest row; its last target token is not fed
READ = 4


@contextmanager
def columns(block: nn.Module) -> Iterator[list[int]]:
    """Record how many columns the block computes, call by call."""
    seen: list[int] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", sorted(PROMPT_ONCE_FAMILIES))
def test_the_last_block_runs_for_the_columns_that_are_read(family: str) -> None:
    """The last block runs for one prompt column and the rows' predicting columns.

    Of the prompt it needs only the keys and values.
    """
    backbone = tiny_backbone(family)
    first, last = blocks_of(backbone.model)
    with torch.no_grad(), columns(first) as whole, columns(last) as narrow:
        prepared = backbone.prepare(random_prompts(backbone, [5, 2]))
        logits, _ = backbone.teacher_forced(prepared, INPUTS, TARGETS, OWNER)
    assert whole == [5, FED]
    assert narrow == [1, READ]
    assert logits.shape[1] == READ


def test_what_is_kept_goes_on() -> None:
    """Rows whose last block skipped unread columns continue as if they had been fed whole."""
    backbone = tiny_backbone("llama", torch.float64)
    with torch.inference_mode():
        prepared = backbone.prepare(random_prompts(backbone, [5, 2]))
        state = backbone.start(prepared, INPUTS, OWNER)
        ids = torch.tensor(random_ids([2] * len(INPUTS), seed=2))
        later, _ = backbone.extend(state, ids, torch.ones_like(ids, dtype=torch.bool))
        whole = backbone.start(
            prepared, [[*row, *more] for row, more in zip(INPUTS, ids.tolist(), strict=True)], OWNER
        )
    torch.testing.assert_close(later[:, -1], whole.logits)


def test_forwards_of_several_threads_stay_apart() -> None:
    """Threads do not interfere: one reads a column, one many, one runs a plain forward."""
    backbone = tiny_backbone("llama", torch.float64)
    # Rows of one length would need no mask, and then the last block runs whole.
    rows = random_ids([12, 9, 12])

    def bare(row: int) -> Tensor:
        with torch.no_grad():
            return backbone.model(input_ids=torch.tensor([rows[row]])).logits[0]

    def ours(count: int) -> Tensor:
        with torch.no_grad():
            inputs, targets = [row[:-count] for row in rows], [row[-count:] for row in rows]
            return backbone.teacher_forced(None, inputs, targets, [0] * len(rows))[0]

    wanted = [bare(row) for row in range(len(rows))]
    with ThreadPoolExecutor(3) as pool, columns(blocks_of(backbone.model)[-1]) as narrow:
        found = [
            (count, pool.submit(ours if count else bare, count))
            for _ in range(20)
            for count in (0, 1, 5)
        ]
        for count, future in found:
            logits = future.result()
            if not count:
                torch.testing.assert_close(logits, wanted[0])
            for row in range(len(rows) if count else 0):
                torch.testing.assert_close(logits[row], wanted[row][-count - 1 : -1])
    assert sorted(set(narrow)) == [1, 5, 12]


def test_a_forward_that_breaks_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama", torch.float64)
    wanted = _logits(backbone)
    last = blocks_of(backbone.model)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last.mlp, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _logits(backbone)
    torch.testing.assert_close(_logits(backbone), wanted, rtol=0, atol=0)


def test_a_model_is_watched_once() -> None:
    model = tiny_backbone("llama").model
    watch(model)
    watch(model)
    last = blocks_of(model)[-1]
    assert (len(last._forward_pre_hooks), len(last._forward_hooks)) == (1, 1)


def test_a_block_without_keys_and_values_says_so() -> None:
    from transformers import DynamicCache

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Plain()])

    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    model = Model()
    watch(model)
    with (
        reading(DynamicCache(), 1),
        pytest.raises(RuntimeError, match="the last block, a Plain, keeps no keys"),
    ):
        model.layers[0](torch.zeros(1, 3, 2), torch.ones(1, 1, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_grouped_heads_are_the_librarys_to_the_bit(family: str) -> None:
    """Shared keys and values give the library's logits and gradients bit for bit.

    Ours reads them in place; the library copies them for each head.
    """
    backbone = tiny_backbone(family)
    assert backbone.model.config._attn_implementation == "orchestrator_grouped"
    found = []
    for implementation in ("orchestrator_grouped", "sdpa"):
        backbone.model.set_attn_implementation(implementation)
        prompts = random_prompts(backbone, [5, 2])
        logits, _ = backbone.teacher_forced(backbone.prepare(prompts), INPUTS, TARGETS, OWNER)
        logits.square().sum().backward()
        found.append((logits, *(prompt.grad for prompt in prompts)))
    backbone.model.set_attn_implementation("orchestrator_grouped")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_copies_for_the_heads_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's function only runs where rows have one query: there its copies are faster."""
    from transformers.integrations import sdpa_attention

    asked: list[int] = []
    library = sdpa_attention.sdpa_attention_forward

    def counted(module: nn.Module, query: Tensor, *args: object, **options: object) -> object:
        asked.append(query.shape[2])
        return library(module, query, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    key = torch.randn(2, 2, 7, 8)
    for queries in (3, 1):
        mask = torch.ones(2, 1, queries, 7, dtype=torch.bool)
        module = nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        out, _ = grouped_attention(module, torch.randn(2, 4, queries, 8), key, key, mask)
        assert out.shape == (2, queries, 4, 8)
    assert asked == [1]


def _logits(backbone: Backbone) -> Tensor:
    assert isinstance(backbone, CausalBackbone)
    with torch.no_grad():
        return backbone.teacher_forced(None, INPUTS, TARGETS, [0] * len(INPUTS))[0]
