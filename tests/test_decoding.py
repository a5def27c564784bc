"""Greedy decoding and beam search against transformers' generate and an exhaustive search."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import alone, random_ids, random_prompts, tiny_backbone
from torch import Tensor

from orchestrator.models.backbone import Backbone
from orchestrator.models.decoding import CachedState, ReplayState, decode, start

LENGTHS = [5, 11, 3, 7, 1, 8]
PROMPT_OF_ROW = [0, 2, 1, 1, 0, 2]
MAX_TOKENS = 9
NO_END = -1


def generated(
    backbone: Backbone,
    prompt: Tensor | None,
    ids: Sequence[int],
    end_id: int,
    max_tokens: int,
    num_beams: int,
) -> list[int]:
    """Return what transformers generates for one unpadded row, cut before the end token."""
    embeds = backbone.embed(torch.tensor([ids]))
    if prompt is not None:
        embeds = torch.cat([prompt[None].to(embeds), embeds], dim=1)
    model: Any = backbone.model
    with torch.no_grad():
        made = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=max_tokens,
            num_beams=num_beams,
            do_sample=False,
            length_penalty=1.0,
            early_stopping=False,
            eos_token_id=None if end_id == NO_END else end_id,
            pad_token_id=0,
        )[0].tolist()
    return made[: made.index(end_id)] if end_id in made else made


def some_end(
    backbone: Backbone, prompts: list[Tensor], inputs: list[list[int]], num_beams: int
) -> int:
    """Return an end token that ends some of the rows and not others.

    It is one of the tokens that the rows generate anyway.
    """

    def made(end_id: int) -> list[list[int]]:
        state = start(backbone, backbone.prepare(prompts), inputs, PROMPT_OF_ROW)
        return decode(state, end_id, MAX_TOKENS, num_beams)

    tokens = Counter(token for row in made(NO_END) for token in row[1:])
    return next(
        token
        for token, _ in tokens.most_common()
        if len({len(row) == MAX_TOKENS for row in made(token)}) == 2
    )


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("family", "prompt_once"),
    [
        ("llama", True),
        ("llama", False),
        ("gpt2", True),
        ("gpt2", False),
        ("gpt_neox", True),
        ("mistral", None),
    ],
)
def test_a_mixed_batch_is_what_generate_gives_each_row(
    family: str, prompt_once: bool | None, num_beams: int
) -> None:
    """A batch of different lengths and prompts gives each row what generate gives it alone.

    Some of the rows end early.
    """
    backbone = tiny_backbone(family, prompt_once=prompt_once)
    prompts, inputs = random_prompts(backbone, [4, 1, 6], seed=5), random_ids(LENGTHS, seed=2)
    with torch.no_grad():
        end_id = some_end(backbone, prompts, inputs, num_beams)
        state = start(backbone, backbone.prepare(prompts), inputs, PROMPT_OF_ROW)
        got = decode(state, end_id, MAX_TOKENS, num_beams)
    assert isinstance(state, CachedState if backbone.prompt_once else ReplayState)
    rows = zip(inputs, PROMPT_OF_ROW, strict=True)
    assert got == [
        generated(backbone, prompts[place], ids, end_id, MAX_TOKENS, num_beams)
        for ids, place in rows
    ]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_any_end_token_ends_a_beam_search_as_generate_does(num_beams: int) -> None:
    """With any generated token as end token, beams end exactly as in generate.

    The end comes early or late, and first or last among a row's beams.
    """
    backbone = tiny_backbone()
    (prompt,), inputs = random_prompts(backbone, [3], seed=9), random_ids([4, 9, 2, 6], seed=7)
    with torch.no_grad():
        prepared = backbone.prepare([prompt])
        free = decode(start(backbone, prepared, inputs, [0] * 4), NO_END, 7, num_beams)
        lengths = set()
        for end_id in sorted({token for row in free for token in row}):
            got = decode(start(backbone, prepared, inputs, [0] * 4), end_id, 7, num_beams)
            assert got == [generated(backbone, prompt, ids, end_id, 7, num_beams) for ids in inputs]
            lengths |= {len(row) for row in got}
    assert len(lengths) > 2


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
def test_the_model_without_a_prompt(prompt_once: bool, num_beams: int) -> None:
    """Without a prompt, rows continue as with the plain model."""
    backbone, inputs = tiny_backbone(prompt_once=prompt_once), random_ids([6, 2], seed=1)
    got = decode(start(backbone, None, inputs, [0, 0]), NO_END, 5, num_beams)
    assert got == [generated(backbone, None, ids, NO_END, 5, num_beams) for ids in inputs]


def test_families_with_a_recurrent_state_are_replayed() -> None:
    """A model without keys and values decodes greedily like its own forward, row by row."""
    backbone = tiny_backbone("mamba")
    prompts, inputs = random_prompts(backbone, [2, 5], seed=4), random_ids([6, 3], seed=1)
    with torch.no_grad():
        got = decode(start(backbone, backbone.prepare(prompts), inputs, [1, 0]), NO_END, 4)
        for ids, place, made in zip(inputs, [1, 0], got, strict=True):
            row: list[int] = []
            while len(row) < 4:
                row.append(int(alone(backbone, prompts[place], [*ids, *row], [0])[-1].argmax()))
            assert made == row


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_end_token_counts_as_a_token(num_beams: int) -> None:
    """The end token counts towards max_tokens.

    With max_tokens 1 a row has one token, or none if the end token comes first. Rows that all end
    at once are all empty.
    """
    backbone, inputs = tiny_backbone(), random_ids([6, 2], seed=1)
    first = [row[0] for row in decode(start(backbone, None, inputs, [0, 0]), NO_END, 1)]
    assert first[0] != first[1]
    assert decode(start(backbone, None, inputs, [0, 0]), first[0], 1, num_beams) == [[], [first[1]]]
    same = [inputs[0], inputs[0]]
    assert decode(start(backbone, None, same, [0, 0]), first[0], 6) == [[], []]


@pytest.mark.parametrize(("max_tokens", "num_beams"), [(0, 1), (3, 0)])
def test_decoding_needs_a_token_and_a_beam(max_tokens: int, num_beams: int) -> None:
    """Zero or negative counts are refused instead of being raised to one."""
    with pytest.raises(ValueError, match="at least 1"):
        decode(Table(torch.zeros(1, 1, 3), [()]), 0, max_tokens, num_beams)


# -- A decoding state that is only a table of logits


class Table:
    """Logits [L, V, V] by step and last token: the smallest state that can be decoded."""

    def __init__(self, table: Tensor, rows: list[tuple[int, ...]]) -> None:
        self.table, self.rows = table, rows

    @property
    def logits(self) -> Tensor:
        return torch.stack([self.table[len(row), row[-1] if row else 0] for row in self.rows])

    def select(self, rows: Tensor) -> Table:
        return Table(self.table, [self.rows[row] for row in rows.tolist()])

    def extend(self, ids: Tensor) -> Table:
        return Table(
            self.table, [(*row, token) for row, token in zip(self.rows, ids.tolist(), strict=True)]
        )


def best_of_all(table: Tensor, end_id: int, max_tokens: int) -> float:
    """Return the best mean log-probability of all continuations up to max_tokens tokens."""
    found = []
    for length in range(1, max_tokens + 1):
        for row in itertools.product(range(table.shape[1]), repeat=length):
            if end_id not in row[:-1] and (row[-1] == end_id or length == max_tokens):
                found.append(score(table, row))
    return max(found)


def score(table: Tensor, row: Sequence[int]) -> float:
    last = [0, *row[:-1]]
    steps = [table[step, last[step]].log_softmax(-1)[token] for step, token in enumerate(row)]
    return float(torch.stack(steps).mean())


@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 4), max_tokens=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_with_beams_for_everything_the_best_continuation_is_found(
    seed: int, tokens: int, max_tokens: int
) -> None:
    """With one beam per possible continuation, beam search is exhaustive and finds the best one."""
    table = 3 * torch.randn(
        max_tokens, tokens, tokens, generator=torch.Generator().manual_seed(seed)
    )
    ((*made,),) = decode(Table(table, [()]), 1, max_tokens, num_beams=tokens**max_tokens)
    whole = made if len(made) == max_tokens else [*made, 1]
    assert score(table, whole) == pytest.approx(best_of_all(table, 1, max_tokens), abs=1e-5)
