"""Metrics of prompts on a split, computed for several prompts in one forward, without gradients.

* ``accuracy``: share of rows where the verbalizer's text with the highest log-probability is the
  right one.
* ``exact_match``: share of rows where greedy decoding gives exactly the target's tokens and then
  the end token. Text outside the verbalizer counts as wrong.
* ``loss``: mean negative log-likelihood of the target tokens.

If a ``Decoding`` is given, texts are also generated and compared (``generate.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.data.batches import longest_first
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors
from orchestrator.models.scoring import answer_scores, answer_tokens, target_log_probs
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.forwards import MAX_TOKENS, Share, SharedForwards
from orchestrator.tuning.generate import Decoding, generated_metrics
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.reports import CONFUSION
from orchestrator.tuning.worker_group import Group

CPU_TOKENS = 2048  # on a CPU, outgrowing the caches costs more than running more forwards


@dataclass
class Tally:
    """Running sums of one prompt over the rows seen so far."""

    rows: int = 0
    ranked: int = 0
    """Rows whose best-ranked answer is the right one."""
    exact: int = 0
    """Rows whose greedy decoding is exactly the target."""
    nll: float = 0.0
    tokens: int = 0
    """Number of target tokens."""
    answered: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of rows by (true label, answered label)."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows + other.rows,
            self.ranked + other.ranked,
            self.exact + other.exact,
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.answered + other.answered,
        )

    def metrics(self, ranking: bool, confusion: bool = False) -> dict[str, float]:
        accuracy = {"accuracy": self.ranked / self.rows} if ranking else {}
        counts = {
            f"{CONFUSION}{true}/{said}": float(rows) for (true, said), rows in self.answered.items()
        }
        more = counts if confusion else {}
        return {
            **accuracy,
            "exact_match": self.exact / self.rows,
            "loss": self.nll / self.tokens,
            **more,
        }


@torch.inference_mode()
def evaluate(
    backbone: Backbone,
    prompts: Sequence[Tensor | PromptTensors] | None,
    split: Encoded,
    encoder: Encoder,
    decoding: Decoding | None = None,
    max_tokens: int | None = None,
    group: Group = Group(),
    confusion: bool = False,
    threads: Threads = Threads(),
) -> list[dict[str, float]]:
    """Return the metrics of each prompt on all rows of a split.

    ``prompts=None`` gives one entry, for the model without a prompt. With ``decoding``, texts are
    generated as well and their metrics are added; the split must then have references.
    ``max_tokens`` is the maximum number of padded tokens in a forward; by default it depends on the
    device. ``confusion`` is as in ``EvaluationJob``. The workers of a ``group``, and the
    ``threads`` of each worker, share each forward's rows; every worker gets the metrics over all
    rows. Raises NoRoom when memory runs out.
    """
    most = max_tokens or forward_tokens(backbone)
    prepared, tallies = group.together(
        lambda: _own_tallies(backbone, prompts, split, encoder, most, group, threads)
    )
    parts = group.gathered(tallies)
    found = [
        sum(of_prompt[1:], of_prompt[0]).metrics(bool(encoder.answers), confusion)
        for of_prompt in zip(*parts, strict=True)
    ]
    if decoding is None:
        return found
    texts = generated_metrics(
        backbone, prepared, split, encoder, decoding, max_tokens, group, threads
    )
    return [{**metrics, **of_texts} for metrics, of_texts in zip(found, texts, strict=True)]


def _own_tallies(
    backbone: Backbone,
    prompts: Sequence[Tensor | PromptTensors] | None,
    split: Encoded,
    encoder: Encoder,
    max_tokens: int,
    group: Group,
    threads: Threads,
) -> tuple[PreparedPrompts | None, list[Tally]]:
    """Prepare the prompts and tally each of them over this worker's rows."""
    count = 1 if prompts is None else len(prompts)
    with needs_room():
        prepared = None if prompts is None else backbone.prepare(prompts)
    forwards = list(longest_first(split.lengths, max_tokens // count, group.size * threads.ways))

    @torch.inference_mode()
    def add_tallies(share: Share, tallies: list[Tally]) -> None:
        rows = [row for _ in range(count) for row in share.rows]
        owner = [prompt for prompt in range(count) for _ in share.rows]
        judged = _judge(backbone, prepared, split, encoder, rows, owner)
        if share.counts:
            _tally(judged, split, rows, owner, tallies)

    parts = SharedForwards(forwards, split.lengths, group, threads, copies=count).run(
        lambda: [Tally() for _ in range(count)], add_tallies
    )
    return prepared, [sum(of_prompt[1:], of_prompt[0]) for of_prompt in zip(*parts, strict=True)]


def forward_tokens(backbone: Backbone) -> int:
    """Return the default maximum number of padded tokens in one forward."""
    return min(MAX_TOKENS, CPU_TOKENS) if backbone.device.type == "cpu" else MAX_TOKENS


def _judge(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    rows: list[int],
    owner: list[int],
) -> Judged:
    judge = _by_answers if encoder.answers and backbone.continues else _by_target
    if all(len(ids) == 1 for ids in encoder.scored_answers):
        judge = _by_target
    return judge(backbone, prompts, split, encoder, rows, owner)


def _tally(
    judged: Judged, split: Encoded, rows: list[int], owner: list[int], tallies: list[Tally]
) -> None:
    for place, (row, prompt) in enumerate(zip(rows, owner, strict=True)):
        tally = tallies[prompt]
        tally.rows += 1
        tally.exact += judged.exact[place]
        tally.nll += judged.nll[place]
        tally.tokens += len(split.targets[row])
        if judged.ranked:
            tally.ranked += judged.ranked[place] == split.labels[row]
            tally.answered[split.labels[row], judged.ranked[place]] += 1


@dataclass(frozen=True)
class Judged:
    """The results of one forward, one entry per row."""

    exact: list[bool]
    """True if greedy decoding gives exactly the target."""
    nll: list[float]
    """Negative log-likelihood of the target."""
    ranked: list[int]
    """Index of the most likely answer; empty without answers to rank."""


def _by_target(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    rows: list[int],
    owner: list[int],
) -> Judged:
    """Judge rows by feeding the right target.

    Answers of one token each are ranked by the logits that predict the target's first token.
    """
    inputs, targets = [split.inputs[row] for row in rows], [split.targets[row] for row in rows]
    logits, wanted = backbone.teacher_forced(prompts, inputs, targets, owner)
    nll = -target_log_probs(logits, wanted).sum(1)
    exact = ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1)
    answers = encoder.scored_answers
    ranked: list[int] = []
    if answers and all(len(ids) == 1 for ids in answers):
        first = (wanted >= 0).long().argmax(1)
        scores = logits[torch.arange(len(logits), device=logits.device), first][
            :, [ids[0] for ids in answers]
        ]
        ranked = scores.argmax(-1).tolist()
    elif answers:
        scored = answer_scores(backbone, prompts, inputs, owner, [answers] * len(inputs))
        ranked = [int(scores.argmax()) for scores in scored]
    return Judged(exact.tolist(), nll.tolist(), ranked)


def _by_answers(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    rows: list[int],
    owner: list[int],
) -> Judged:
    """Judge rows by feeding every answer after the input's KV cache.

    The input runs only once, however many answers there are and however long they are.
    """
    count = len(encoder.answers)
    ended = encoder.ended_answers
    log_probs, greedy = answer_tokens(
        backbone, prompts, [split.inputs[row] for row in rows], owner, [ended] * len(rows)
    )
    labels = torch.tensor([split.labels[row] for row in rows], device=log_probs.device)
    right = torch.arange(len(rows), device=log_probs.device) * count + labels
    scored = torch.tensor(
        [len(ids) for ids in encoder.scored_answers], device=log_probs.device
    ).repeat(len(rows))
    counts = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] < scored[:, None]
    ranked = (log_probs * counts).sum(1).view(-1, count).argmax(1)
    return Judged(
        greedy[right].all(1).tolist(), (-log_probs[right].sum(1)).tolist(), ranked.tolist()
    )
