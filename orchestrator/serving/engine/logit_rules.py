"""Changes that a request makes to a row's logits before the next token is chosen.

Definitions and order are vLLM's: forbidden tokens, biases, then penalties.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitRules:
    """Biases and penalties of tokens; the defaults change nothing."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the row has generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the row has generated it."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of all tokens that are in the
    row's input or that it has generated (Keskar et al. 2019)."""
    bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""

    @property
    def changes_nothing(self) -> bool:
        return self == UNCHANGED

    def applied(self, logits: Tensor, input_ids: Sequence[int], made: Sequence[int]) -> Tensor:
        """Return changed logits [V] of a row that has generated the tokens ``made``."""
        logits = logits.clone()
        if self.bias:
            ids, values = zip(*self.bias, strict=True)
            logits[list(ids)] += torch.tensor(values)
        if self.repetition_penalty != 1:
            seen = torch.tensor([*input_ids, *made]).unique()
            factors = torch.where(
                logits[seen] > 0, 1 / self.repetition_penalty, self.repetition_penalty
            )
            logits[seen] *= factors
        if made and (self.presence_penalty or self.frequency_penalty):
            tokens, counts = torch.tensor(made).unique(return_counts=True)
            logits[tokens] -= self.presence_penalty + self.frequency_penalty * counts
        return logits


UNCHANGED = LogitRules()


def without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return logits [V] at which none of the tokens can be chosen.

    If no other token could be chosen, the logits are returned as they are.
    """
    others = logits.index_fill(0, torch.tensor(list(tokens)), -torch.inf)
    return logits if bool(others.isneginf().all()) else others


def truncated(probs: Tensor, top_k: int, min_p: float) -> Tensor:
    """Return probabilities [V] of only the likeliest tokens; they sum to one.

    ``probs`` are sorted, likeliest first. Tokens stay that are at least ``min_p`` times as likely
    as the likeliest one and among the first ``top_k``; 0 keeps any number of tokens.
    """
    kept = probs.masked_fill(probs < min_p * probs[0], 0)
    if top_k:
        kept[top_k:] = 0
    return kept / kept.sum()
