"""Scores of answers: the one computation behind training loss, evaluation and serving.

Shapes: B rows, Y target tokens, V vocabulary, C answers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.models.backbone import Backbone, PreparedPrompts

Ids = Sequence[int]


def answer_scores(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    answers: Sequence[Sequence[Ids]],
) -> list[Tensor]:
    """For each row the log-probability [C] of each of its answers (sum over the answer's tokens), float32 on the CPU.

    ``answers[b]`` are the token ids that row b chooses from; rows may have different ones. The input runs once,
    however many answers there are and however long they are.
    """
    if all(len(ids) == 1 for choices in answers for ids in choices):
        logits, _ = backbone.teacher_forced(
            prompts, inputs, [choices[0] for choices in answers], prompt
        )
        first = logits[:, 0].float().log_softmax(-1)
        return [
            first[place, torch.tensor([ids[0] for ids in choices], device=first.device)].cpu()
            for place, choices in enumerate(answers)
        ]
    if not backbone.continues:
        return _scores_of_pairs(backbone, prompts, inputs, prompt, answers)
    log_probs, _ = answer_tokens(backbone, prompts, inputs, prompt, answers)
    return _split_by_row(log_probs.sum(1).cpu(), answers)


def answer_tokens(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    answers: Sequence[Sequence[Ids]],
) -> tuple[Tensor, Tensor]:
    """Every (row, answer) pair, one after another: log-probability [N, Y] of each token of the answer (0 after its
    end), and whether greedy decoding would have chosen it [N, Y] (true after its end).

    The input runs once and its cache is shared by the row's answers. Needs a backbone that ``continues``.
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
        # A fed token at column j predicts column j + 1; a row's last token is fed too where another row goes on.
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
    """Every (row, answer) pair is a row of its own: the plain path, and masked models, whose blank is as long as the
    answer. A masked model's answers of one length share their blank, so those run once."""
    pairs = [(row, tuple(ids)) for row, choices in enumerate(answers) for ids in choices]
    # What a masked model predicts depends on the answer's length alone; elsewhere on the answer itself.
    runs = {
        (row, len(ids) if backbone.family == "masked" else ids): (row, ids) for row, ids in pairs
    }
    place = {key: number for number, key in enumerate(runs)}
    logits, _ = backbone.teacher_forced(
        prompts,
        [inputs[row] for row, _ in runs.values()],
        [ids for _, ids in runs.values()],
        [prompt[row] for row, _ in runs.values()],
    )
    log_probs = logits.float().log_softmax(-1)
    scores = []
    for row, ids in pairs:
        run = log_probs[place[row, len(ids) if backbone.family == "masked" else ids]]
        start = (
            run.shape[0] - len(ids) if backbone.family == "causal" else 0
        )  # causal targets end at the right edge
        scores.append(run[start + torch.arange(len(ids)), torch.tensor(ids)].sum())
    return _split_by_row(torch.stack(scores).cpu(), answers)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, Y] log-probability of each target token, 0 where there is none. The head's sum runs in float32."""
    picked = logits.float().log_softmax(-1).gather(2, targets.clamp(min=0)[:, :, None]).squeeze(2)
    return picked * (targets >= 0)


def _split_by_row(scores: Tensor, answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    return list(scores.split([len(choices) for choices in answers]))
