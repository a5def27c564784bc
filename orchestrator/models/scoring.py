"""Scores of answers, as used by training loss, evaluation and serving.

Shapes: B rows, Y target tokens, V vocabulary, C answers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.models.answer_tree import AnswerTrees
from orchestrator.models.backbone import Backbone, PreparedPrompts
from orchestrator.models.ranking import rank

Ids = Sequence[int]


def answer_scores(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    answers: Sequence[Sequence[Ids]],
) -> list[Tensor]:
    """Return the log-probability [C] of each answer, for each row, in float32 on the CPU.

    The log-probability of an answer is the sum over its tokens. ``answers[b]`` are the token ids of
    the answers that row b chooses from; rows may have different answers. Where rows can continue
    from a cache, the input runs once, however many answers there are and however long they are. On
    the plain path and in masked models, longer answers run the input again. Answers that begin
    alike share their beginning (``ranking.py``), unless the backbone's ``answers_as_tree`` is off.
    """
    if all(len(ids) == 1 for choices in answers for ids in choices):
        logits, _ = backbone.teacher_forced(
            prompts, inputs, [choices[0] for choices in answers], prompt
        )
        first = logits[:, 0].float().log_softmax(-1)
        return [
            first[row_index, torch.tensor([ids[0] for ids in choices], device=first.device)].cpu()
            for row_index, choices in enumerate(answers)
        ]
    if ranks_as_tree(backbone):
        trees = AnswerTrees.of_rows(answers, backbone.device)
        scores = rank(backbone, prompts, inputs, prompt, trees).scores.cpu()
        return [row[: len(choices)] for row, choices in zip(scores, answers, strict=True)]
    if not backbone.continues:
        return _scores_of_pairs(backbone, prompts, inputs, prompt, answers)
    log_probs, _ = answer_tokens(backbone, prompts, inputs, prompt, answers)
    return _split_by_row(log_probs.sum(1).cpu(), answers)


def ranks_as_tree(backbone: Backbone) -> bool:
    """Return whether answers of several tokens are ranked as a tree of their tokens.

    A masked model predicts all tokens of an answer at once, so that its answers share no beginning.
    """
    return backbone.answers_as_tree and backbone.family != "masked"


def answer_tokens(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    answers: Sequence[Sequence[Ids]],
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer token, and whether greedy decoding would choose it.

    Both are [N, Y] over all N (row, answer) pairs in order. After the end of an answer the
    log-probability is 0 and the choice is true. The input runs once and a row's answers share its
    cache. Needs a backbone that ``continues``.
    """
    state = backbone.start(prompts, inputs, prompt)
    device = backbone.device
    owner = torch.tensor(
        [row for row, choices in enumerate(answers) for _ in choices], device=device
    )
    flat = [list(ids) for choices in answers for ids in choices]
    longest = max(map(len, flat))
    target = torch.tensor([[*ids, *[-100] * (longest - len(ids))] for ids in flat], device=device)
    real = target >= 0
    logits = state.logits[owner][:, None]
    if longest > 1:
        # The token fed at column j predicts column j + 1. The last token of a short answer is fed
        # too, because longer answers continue in that column.
        later, _ = backbone.extend(state.select(owner), target[:, :-1].clamp(min=0), real[:, :-1])
        logits = torch.cat([logits, later], dim=1)
    return target_log_probs(logits, target), (logits.argmax(-1) == target) | ~real


def _scores_of_pairs(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    answers: Sequence[Sequence[Ids]],
) -> list[Tensor]:
    """Score each (row, answer) pair as a row of its own.

    This is for the plain path, and for masked models, whose blank is as long as the answer. A
    masked model's answers of equal length share a blank, and therefore share a run.
    """
    pairs = [(row, tuple(ids)) for row, choices in enumerate(answers) for ids in choices]
    # A masked model's prediction depends on the length of the answer only, a causal model's on the
    # answer's tokens.
    keys = [(row, len(ids) if backbone.family == "masked" else ids) for row, ids in pairs]
    runs = dict(zip(keys, pairs, strict=True))
    run_index = {key: number for number, key in enumerate(runs)}
    logits, _ = backbone.teacher_forced(
        prompts,
        [inputs[row] for row, _ in runs.values()],
        [ids for _, ids in runs.values()],
        [prompt[row] for row, _ in runs.values()],
    )
    log_probs = logits.float().log_softmax(-1)
    scores = []
    for key, (_, ids) in zip(keys, pairs, strict=True):
        run = log_probs[run_index[key]]
        # Targets of causal models end at the right edge.
        start = run.shape[0] - len(ids) if backbone.family == "causal" else 0
        scores.append(run[start + torch.arange(len(ids)), torch.tensor(ids)].sum())
    return _split_by_row(torch.stack(scores).cpu(), answers)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability [B, Y] of each target token, and 0 where there is no target.

    The softmax is computed in float32.
    """
    picked = logits.float().log_softmax(-1).gather(2, targets.clamp(min=0)[:, :, None]).squeeze(2)
    return picked * (targets >= 0)


def _split_by_row(scores: Tensor, answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    return list(scores.split([len(choices) for choices in answers]))
