"""Greedy decoding and beam search over rows that grow by one token at a time.

Both use only a ``DecodingState``, which has two implementations. One keeps keys and values; the
other runs the whole rows again at every step.

Shapes: B rows, K prompts, N beams of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

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
    """Rows with the logits of their next token.

    A state is used once, because extending it may change it.
    """

    @property
    def logits(self) -> Tensor:
        """[B, V] of each row's next token."""

    def select(self, rows: Tensor) -> Self:
        """Return the state of the given rows [B'], in that order; rows may be repeated."""

    def extend(self, ids: Tensor) -> Self:
        """Return the state after one further token [B] in each row."""

    def join(self, other: Self) -> Self | None:
        """Return the state of this state's rows and then the other's, or None.

        None means that the rows can't share a forward.
        """


@dataclass
class CachedState:
    """A state that keeps keys and values, so that a step costs one token per row.

    Needs a backbone that ``continues``.
    """

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
            # An encoder-decoder's decoder numbers the columns of the whole batch, so all rows have
            # to begin together.
            return None
        return CachedState(self.backbone, CausalState.join([self.rows, other.rows]))


@dataclass
class ReplayState:
    """A state that runs the whole rows again at every step.

    ``sequences`` are the rows so far, and ``prompt`` [B] is the index of each row's prompt.
    """

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
        # Only the logits of the first target token are used, and they don't depend on the target.
        logits, _ = backbone.teacher_forced(prompts, sequences, [[0]] * len(sequences), prompt)
        return cls(backbone, prompts, sequences, prompt, logits[:, 0])

    def select(self, rows: Tensor) -> ReplayState:
        places = rows.tolist()
        sequences, prompt = (
            [self.sequences[index] for index in places],
            [self.prompt[index] for index in places],
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
        # Drop prompts that no row uses any more, because a batch may run without end.
        own_prompts, other_prompts = sorted(set(self.prompt)), sorted(set(other.prompt))
        used_prompts = [self.prompts.select(own_prompts), other.prompts.select(other_prompts)]
        if not self.backbone.shares_forward(used_prompts[0].kinds | used_prompts[1].kinds):
            return None
        prompt_of_row = [own_prompts.index(prompt) for prompt in self.prompt]
        prompt_of_row += [len(own_prompts) + other_prompts.index(prompt) for prompt in other.prompt]
        sequences, logits = (
            [*self.sequences, *other.sequences],
            torch.cat([self.logits, other.logits]),
        )
        return ReplayState(
            self.backbone, stack_prepared(used_prompts), sequences, prompt_of_row, logits
        )


def start(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Sequence[int]],
    prompt: Sequence[int],
) -> DecodingState:
    """Run the inputs, each after the prompt of index ``prompt[row]``; return the state.

    Inputs may have any lengths. ``prompts=None`` runs the model without a prompt.
    """
    if backbone.continues:
        return CachedState(backbone, backbone.start(prompts, inputs, prompt))
    return ReplayState.of(backbone, prompts, [list(ids) for ids in inputs], list(prompt))


@torch.inference_mode()
def decode(
    state: DecodingState, end_id: int, max_tokens: int, num_beams: int = 1
) -> list[list[int]]:
    """Return the tokens that each row continues with, without the end token.

    A continuation has at most ``max_tokens`` tokens, the end token included. One beam is greedy
    decoding. A row's result does not depend on the other rows. Raises ValueError if ``max_tokens``
    or ``num_beams`` is below 1.
    """
    if max_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_tokens {max_tokens} and num_beams {num_beams} have to be at least 1")
    if num_beams == 1:
        return _greedy(state, end_id, max_tokens)
    return _beam_search(state, end_id, max_tokens, num_beams)


def _greedy(state: DecodingState, end_id: int, max_tokens: int) -> list[list[int]]:
    continuations: list[list[int]] = [[] for _ in range(len(state.logits))]
    running = list(range(len(continuations)))
    for length in range(1, max_tokens + 1):
        ids = state.logits.argmax(-1)
        tokens = ids.tolist()
        continuing = [index for index, token in enumerate(tokens) if token != end_id]
        running = [running[index] for index in continuing]
        for row, index in zip(running, continuing, strict=True):
            continuations[row].append(tokens[index])
        if not continuing or length == max_tokens:
            break
        if len(continuing) < len(tokens):  # selecting copies the cache
            kept_indices = torch.tensor(continuing, device=ids.device)
            state, ids = state.select(kept_indices), ids[kept_indices]
        state = state.extend(ids)
    return continuations


@dataclass
class Finished:
    """The best finished continuations of one row, best first, at most ``places`` of them."""

    places: int
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, ids: list[int]) -> None:
        self.found.append((score, ids))
        # The sort is stable, so that of two equal scores the earlier continuation stays in front.
        self.found.sort(key=lambda scored: scored[0], reverse=True)
        del self.found[self.places :]

    def beats(self, score: float) -> bool:
        """Return whether all places are taken by continuations at least as good as this score."""
        return len(self.found) == self.places and self.found[-1][0] >= score


def _beam_search(
    state: DecodingState, end_id: int, max_tokens: int, num_beams: int
) -> list[list[int]]:
    """Search with N beams for each row, and return the best continuation of each row.

    The result is that of transformers' ``generate(num_beams=N, do_sample=False, length_penalty=1.0,
    early_stopping=False)``.

    The score of a continuation is the mean log-probability of its tokens, end token included. Each
    step takes the 2 N best continuations of a row's beams. Those that end and are among the first N
    are finished. The N best that do not end become the next beams. A row is done once N
    continuations are finished and the best beam, scored at its present length, is no better than
    the worst of them.
    """
    finished = [Finished(num_beams) for _ in range(len(state.logits))]
    beams = _Beams.start(state, num_beams)
    for length in range(1, max_tokens + 1):
        scores, origin, ids = beams.candidates()
        ends = (ids == end_id) if length < max_tokens else torch.ones_like(ids, dtype=torch.bool)
        for row_index, rank in ends[:, :num_beams].nonzero().tolist():
            token = int(ids[row_index, rank])
            continuation = list(beams.made[row_index][int(origin[row_index, rank])])
            if token != end_id:
                continuation.append(token)
            score = float(scores[row_index, rank]) / length
            finished[beams.rows[row_index]].add(score, continuation)
        if length == max_tokens:
            break
        open_scores, best_columns = scores.masked_fill(ends, -math.inf).topk(num_beams)
        best = (open_scores[:, 0] / length).tolist()
        undecided = [
            row_index
            for row_index, row in enumerate(beams.rows)
            if not finished[row].beats(best[row_index])
        ]
        if not undecided:
            break
        origin, ids = origin.gather(1, best_columns), ids.gather(1, best_columns)
        beams = beams.advance(undecided, open_scores, origin, ids)
    return [row_results.found[0][1] for row_results in finished]


@dataclass
class _Beams:
    """The N running beams of each row that is not done.

    ``rows[place]`` is the row's index in the batch. ``scores`` [rows, N] are sums of
    log-probabilities. ``made[place][beam]`` are the beam's tokens so far. ``state`` has rows x N
    rows, with the beams of a row next to each other.
    """

    state: DecodingState
    rows: list[int]
    made: list[list[list[int]]]
    scores: Tensor

    @classmethod
    def start(cls, state: DecodingState, num_beams: int) -> _Beams:
        """Start N beams for each row.

        All but the first start at a score of minus infinity. Otherwise all N would take the same
        tokens.
        """
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
        """Return score, beam and token, each [rows, 2 N], of each row's best continuations.

        The 2 N best continuations of each row are sorted, best first.
        """
        rows, num_beams = self.scores.shape
        log_probs = self.state.logits.float().log_softmax(-1).view(rows, num_beams, -1)
        scores, flat = (log_probs + self.scores[:, :, None]).flatten(1).topk(2 * num_beams)
        return scores, flat // log_probs.shape[2], flat % log_probs.shape[2]

    def advance(self, places: list[int], scores: Tensor, origin: Tensor, ids: Tensor) -> _Beams:
        """Extend the beams of the rows at ``places`` by one token.

        The new beam n of a row is its old beam ``origin[n]`` followed by the token ``ids[n]``.
        """
        indices = torch.tensor(places, device=scores.device)
        scores, origin, ids = scores[indices], origin[indices], ids[indices]
        state = self.state.select((indices[:, None] * scores.shape[1] + origin).flatten()).extend(
            ids.flatten()
        )
        made = []
        for row_index, beams, tokens in zip(places, origin.tolist(), ids.tolist(), strict=True):
            pairs = zip(beams, tokens, strict=True)
            made.append([[*self.made[row_index][beam], token] for beam, token in pairs])
        return _Beams(state, [self.rows[row_index] for row_index in places], made, scores)
