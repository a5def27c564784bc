"""Log-probabilities of the tokens of rows' inputs, each after the tokens before it.

Shapes: B rows, T columns of a forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.models.backbone import Backbone, CausalBackbone, PreparedPrompts
from orchestrator.models.backbone.rows import Rows
from orchestrator.models.placeholders import placed, text_ids
from orchestrator.serving.prompts.served_prompt import ServedPrompt, stack_prompts

MAX_LOGITS = 1 << 26
"""The largest number of logits of one forward; they take 256 MiB in float32."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of an input, its log-probability and rank, and the likeliest tokens in its place.

    The first token of an input has no log-probability, as in OpenAI's answers.
    """

    token: int
    logprob: float | None = None
    rank: int | None = None
    """The number of tokens that are at least as likely; 1 is the likeliest token."""
    likeliest: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def score_inputs(
    backbone: Backbone,
    prompts: Sequence[ServedPrompt],
    inputs: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> list[tuple[ScoredToken, ...]]:
    """Score the tokens of B inputs, each behind its own prompt.

    ``counts`` says how many of the likeliest tokens to report for each row. Raises ValueError for a
    model that is not causal, which reads its input in both directions.
    """
    if not isinstance(backbone, CausalBackbone):
        raise ValueError(f"a {backbone.family} model gives its input no log-probabilities")
    stacked, prompt_of_row = stack_prompts(prompts)
    virtual_tokens = backbone.inner_counts(stacked, prompt_of_row)
    rows = [placed(ids, count) for ids, count in zip(inputs, virtual_tokens, strict=True)]
    scored = [[ScoredToken(token) for token in text_ids(row)[:1]] for row in rows]
    for group in _groups(rows, max(1, MAX_LOGITS // len(backbone.table))):
        logits = _logits(backbone, stacked, rows, prompt_of_row, group)
        for row_logits, part in zip(logits, group, strict=True):
            scored[part.row] += _scored(row_logits, rows[part.row], part, counts[part.row])
    return [tuple(tokens) for tokens in scored]


@dataclass(frozen=True)
class _Part:
    """The columns of a row whose logits one forward computes, from ``start`` up to ``end``."""

    row: int
    start: int
    end: int


def _groups(rows: Sequence[Sequence[int]], columns: int) -> Iterator[list[_Part]]:
    """Yield the parts of rows that share a forward; at most ``columns`` logits are computed in it.

    A row that is longer by itself is computed in parts, each with all columns before it.
    """
    group: list[_Part] = []
    width = 0
    for row_index, row in enumerate(rows):
        if group and (len(group) + 1) * max(width, len(row)) > columns:
            yield group
            group, width = [], 0
        if len(row) > columns:
            for start in range(0, len(row), columns):
                yield [_Part(row_index, start, min(len(row), start + columns))]
        else:
            group.append(_Part(row_index, 0, len(row)))
            width = max(width, len(row))
    if group:
        yield group


def _logits(
    backbone: CausalBackbone,
    prompts: PreparedPrompts,
    rows: Sequence[Sequence[int]],
    prompt_of_row: Sequence[int],
    group: Sequence[_Part],
) -> Tensor:
    """Return the logits [B, T, V] of the parts' columns, which end at the right edge."""
    fed = [rows[part.row][: part.end] for part in group]
    padded = Rows.pad(fed, [prompt_of_row[part.row] for part in group], backbone.device)
    return backbone.target_logits(prompts, padded, max(part.end - part.start for part in group))


def _scored(logits: Tensor, row: Sequence[int], part: _Part, count: int) -> list[ScoredToken]:
    """Score the tokens that the columns of a part predict, from the part's logits [T, V]."""
    # A virtual token is not predicted, and neither is the row's first token, which is column 0 or
    # follows virtual tokens only.
    first = next((column for column, token in enumerate(row) if token >= 0), len(row))
    targets = [
        column + 1
        for column in range(part.start, min(part.end, len(row) - 1))
        if row[column + 1] >= 0 and column >= first
    ]
    if not targets:
        return []
    offset = len(logits) - part.end  # the part's last column is the last one of the logits
    columns = torch.tensor([target - 1 + offset for target in targets], device=logits.device)
    tokens = torch.tensor([row[target] for target in targets], device=logits.device)
    log_probs = logits[columns].float().log_softmax(-1)
    chosen = log_probs.gather(1, tokens[:, None])
    ranks = (log_probs >= chosen).sum(1)
    values, ids = log_probs.topk(min(count, log_probs.shape[1]))
    likeliest = (
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    )
    facts = zip(tokens.tolist(), chosen[:, 0].tolist(), ranks.tolist(), likeliest, strict=True)
    return [ScoredToken(*fact) for fact in facts]
