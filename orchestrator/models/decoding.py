"""Greedy decoding and beam search over rows that grow by a token at a time.

Both see a ``DecodingState`` only, which has two implementations: one keeps keys and values, one runs the whole rows
again.
Shapes: B rows, K prompts, N beams of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from orchestrator.models.backbone import (
    Backbone,
    CausalState,
    PreparedPrompts,
    RowState,
    stack_prepared,
)


class DecodingState(Protocol):
    """Rows and what comes next in each. A state is used once: going on from it may change it."""

    @property
    def logits(self) -> Tensor:
        """[B, V] of each row's next token."""

    def select(self, rows: Tensor) -> Self:
        """The state of the given rows [B'], in that order, with repetition."""

    def extend(self, ids: Tensor) -> Self:
        """The state after one further token [B] in each row."""

    def join(self, other: Any) -> Self | None:
        """The rows of both, this one's first; None where they can't share a forward."""


@dataclass
class CachedState:
    """Keys and values are kept: a step costs one token a row. Needs a backbone that ``continues``."""

    backbone: Backbone
    rows: RowState

    @property
    def logits(self) -> Tensor:
        return self.rows.logits

    def select(self, rows: Tensor) -> CachedState:
        return CachedState(self.backbone, self.rows.select(rows))

    def extend(self, ids: Tensor) -> CachedState:
        mask = torch.ones_like(ids, dtype=torch.bool)[:, None]
        return CachedState(self.backbone, self.backbone.extend(self.rows, ids[:, None], mask)[1])

    def join(self, other: CachedState) -> CachedState | None:
        if not isinstance(self.rows, CausalState) or not isinstance(other.rows, CausalState):
            return None  # a decoder counts the columns of its batch: rows have to begin together
        return CachedState(self.backbone, CausalState.join([self.rows, other.rows]))


@dataclass
class ReplayState:
    """The rows so far and the index of each row's prompt [B]; every step runs the whole rows again."""

    backbone: Backbone
    prompts: PreparedPrompts | None
    sequences: list[list[int]]
    prompt: list[int]
    logits: Tensor

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        prompts: PreparedPrompts | None,
        sequences: list[list[int]],
        prompt: list[int],
    ) -> ReplayState:
        # The target is only asked for its first token, whichever it is.
        logits, _ = backbone.teacher_forced(prompts, sequences, [[0]] * len(sequences), prompt)
        return cls(backbone, prompts, sequences, prompt, logits[:, 0])

    def select(self, rows: Tensor) -> ReplayState:
        places = rows.tolist()
        sequences, prompt = (
            [self.sequences[place] for place in places],
            [self.prompt[place] for place in places],
        )
        return ReplayState(self.backbone, self.prompts, sequences, prompt, self.logits[rows])

    def extend(self, ids: Tensor) -> ReplayState:
        sequences = [
            [*sequence, token] for sequence, token in zip(self.sequences, ids.tolist(), strict=True)
        ]
        return ReplayState.of(self.backbone, self.prompts, sequences, self.prompt)

    def join(self, other: ReplayState) -> ReplayState | None:
        if self.prompts is None or other.prompts is None:
            return None
        # Prompts that no row has any more are dropped: a batch may run for ever.
        mine, theirs = sorted(set(self.prompt)), sorted(set(other.prompt))
        kept = [self.prompts.select(mine), other.prompts.select(theirs)]
        if not self.backbone.shares_forward(kept[0].kinds | kept[1].kinds):
            return None
        place = [mine.index(one) for one in self.prompt]
        place += [len(mine) + theirs.index(one) for one in other.prompt]
        sequences, logits = (
            [*self.sequences, *other.sequences],
            torch.cat([self.logits, other.logits]),
        )
        return ReplayState(self.backbone, stack_prepared(kept), sequences, place, logits)


def start(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Sequence[int]],
    prompt: Sequence[int],
) -> DecodingState:
    """The state after the inputs, of any lengths, each behind the prompt that ``prompt[row]`` names.

    ``prompts=None`` is the model without a prompt.
    """
    if backbone.continues:
        return CachedState(backbone, backbone.start(prompts, inputs, prompt))
    return ReplayState.of(backbone, prompts, [list(ids) for ids in inputs], list(prompt))


@torch.inference_mode()
def decode(
    state: DecodingState, end_id: int, max_tokens: int, num_beams: int = 1
) -> list[list[int]]:
    """What each row goes on with, without the end token: at most ``max_tokens`` tokens, the end token counted.

    One beam is greedy decoding. A row's result does not depend on the other rows.
    """
    if max_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_tokens {max_tokens} and num_beams {num_beams} have to be at least 1")
    if num_beams == 1:
        return _greedy(state, end_id, max_tokens)
    return _beam_search(state, end_id, max_tokens, num_beams)


def _greedy(state: DecodingState, end_id: int, max_tokens: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in range(len(state.logits))]
    running = list(range(len(made)))
    for length in range(1, max_tokens + 1):
        ids = state.logits.argmax(-1)
        tokens = ids.tolist()
        going = [place for place, token in enumerate(tokens) if token != end_id]
        running = [running[place] for place in going]
        for row, place in zip(running, going, strict=True):
            made[row].append(tokens[place])
        if not going or length == max_tokens:
            break
        if len(going) < len(tokens):  # selecting copies the cache
            places = torch.tensor(going, device=ids.device)
            state, ids = state.select(places), ids[places]
        state = state.extend(ids)
    return made


@dataclass
class Finished:
    """The best ended continuations of one row so far, best first, and never more than ``places``."""

    places: int
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, ids: list[int]) -> None:
        self.found.append((score, ids))
        self.found.sort(
            key=lambda one: one[0], reverse=True
        )  # stable: of two equal ones the earlier stays in front
        del self.found[self.places :]

    def beats(self, score: float) -> bool:
        """Whether all places are taken and none by a worse continuation than this score."""
        return len(self.found) == self.places and self.found[-1][0] >= score


def _beam_search(
    state: DecodingState, end_id: int, max_tokens: int, num_beams: int
) -> list[list[int]]:
    """As transformers' ``generate(num_beams=N, do_sample=False, length_penalty=1.0, early_stopping=False)``.

    A continuation's score is the mean log-probability of its tokens, end token included. Each step takes the 2 N best
    continuations of a row's beams; those among the first N that end are finished, and the N best that do not end go
    on. A row is over once N are finished and the best beam, scored at its present length, is no better than the worst
    of them.
    """
    finished = [Finished(num_beams) for _ in range(len(state.logits))]
    beams = _Beams.start(state, num_beams)
    for length in range(1, max_tokens + 1):
        scores, origin, ids = beams.candidates()
        ends = (ids == end_id) if length < max_tokens else torch.ones_like(ids, dtype=torch.bool)
        for place, rank in ends[:, :num_beams].nonzero().tolist():
            token = int(ids[place, rank])
            continuation = [
                *beams.made[place][int(origin[place, rank])],
                *([token] if token != end_id else []),
            ]
            finished[beams.rows[place]].add(float(scores[place, rank]) / length, continuation)
        if length == max_tokens:
            break
        going, kept = scores.masked_fill(ends, -math.inf).topk(num_beams)
        best = (going[:, 0] / length).tolist()
        open_places = [
            place for place, row in enumerate(beams.rows) if not finished[row].beats(best[place])
        ]
        if not open_places:
            break
        beams = beams.advance(open_places, going, origin.gather(1, kept), ids.gather(1, kept))
    return [one.found[0][1] for one in finished]


@dataclass
class _Beams:
    """The N running beams of each row that is not over: ``rows[place]`` is the row's index in the batch.

    ``scores`` [rows, N] sums of log-probabilities; ``made[place][beam]`` tokens so far; ``state`` of rows x N, a row's
    beams one after another.
    """

    state: DecodingState
    rows: list[int]
    made: list[list[list[int]]]
    scores: Tensor

    @classmethod
    def start(cls, state: DecodingState, num_beams: int) -> _Beams:
        """The first beam alone counts, or all N would take the same tokens."""
        rows, device = len(state.logits), state.logits.device
        scores = torch.full((rows, num_beams), -math.inf, device=device)
        scores[:, 0] = 0
        spread = torch.arange(rows, device=device).repeat_interleave(num_beams)
        return cls(
            state.select(spread),
            list(range(rows)),
            [[[] for _ in range(num_beams)] for _ in range(rows)],
            scores,
        )

    def candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The 2 N best continuations of each row, best first: score, beam and token, each [rows, 2 N]."""
        rows, num_beams = self.scores.shape
        log_probs = self.state.logits.float().log_softmax(-1).view(rows, num_beams, -1)
        scores, flat = (log_probs + self.scores[:, :, None]).flatten(1).topk(2 * num_beams)
        return scores, flat // log_probs.shape[2], flat % log_probs.shape[2]

    def advance(self, places: list[int], scores: Tensor, origin: Tensor, ids: Tensor) -> _Beams:
        """The rows at ``places`` after one token: beam n of a row is its beam ``origin[n]`` with token ``ids[n]``."""
        kept = torch.tensor(places, device=scores.device)
        scores, origin, ids = scores[kept], origin[kept], ids[kept]
        state = self.state.select((kept[:, None] * scores.shape[1] + origin).flatten()).extend(
            ids.flatten()
        )
        made = [
            [[*self.made[place][beam], token] for beam, token in zip(beams, tokens, strict=True)]
            for place, beams, tokens in zip(places, origin.tolist(), ids.tolist(), strict=True)
        ]
        return _Beams(state, [self.rows[place] for place in places], made, scores)
