"""Metrics of prompts on a split, several prompts in one forward, without gradients.

``accuracy``: the verbalizer's text with the highest log-probability is the right one. ``exact_match``: greedy decoding
gives exactly the target's tokens and then the end token; an illegal answer counts as wrong. ``loss``: mean negative
log-likelihood of the target tokens. Texts are generated and compared (``generate.py``) where a ``Decoding`` is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors
from orchestrator.models.scoring import answer_scores, answer_tokens, target_log_probs
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.generate import Decoding, generated_metrics
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.reports import CONFUSION
from orchestrator.tuning.worker_group import Group

MAX_TOKENS = 16384  # padded tokens of one forward
CPU_TOKENS = 2048  # there, what no longer fits the caches costs more than further forwards


@dataclass
class Tally:
    """Running sums of one prompt over the rows seen so far."""

    rows: int = 0
    ranked: int = 0
    exact: int = 0
    nll: float = 0.0
    tokens: int = 0
    answered: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Rows by (true label, answered label)."""

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
    """Metrics of each prompt on all rows; ``None`` evaluates the model without a prompt, as one entry.

    ``decoding``: also generate, and add the metrics of the texts; the split then has references. ``max_tokens``: padded
    tokens of a forward at most, by default what suits the device. ``confusion``: as in ``EvaluationJob``. Raises NoRoom
    when memory runs out. The workers of a
    ``group`` share each forward's rows, and so do a worker's ``threads``; all get the metrics of all rows.
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
    """The prompts made ready, and each one's tally over this worker's rows."""
    count = 1 if prompts is None else len(prompts)
    with needs_room():
        prepared = None if prompts is None else backbone.prepare(prompts)
    forwards = list(_forwards(split, max_tokens // count, group.size * threads.ways))

    @torch.inference_mode()
    def part_tallies(part: int) -> list[Tally]:
        tallies = [Tally() for _ in range(count)]
        for places in forwards:
            own = threads.share(group.share(places))[part]
            each = own or (
                places[:1] if threads.ways == 1 else []
            )  # all workers run as many forwards
            if not each:
                continue
            rows, owner = (
                [row for _ in range(count) for row in each],
                [prompt for prompt in range(count) for _ in each],
            )
            tokens = len(rows) * max(split.lengths[row] for row in rows)
            with needs_room(tokens, divisible=len(each) > 1 or threads.ways > 1):
                judged = _judge(backbone, prepared, split, encoder, rows, owner)
            if own:
                _tally(judged, split, rows, owner, tallies)
        return tallies

    parts = threads.each(part_tallies)
    return prepared, [sum(of_prompt[1:], of_prompt[0]) for of_prompt in zip(*parts, strict=True)]


def forward_tokens(backbone: Backbone) -> int:
    """Padded tokens of one forward at most, by default."""
    return min(MAX_TOKENS, CPU_TOKENS) if backbone.device.type == "cpu" else MAX_TOKENS


def _forwards(split: Encoded, max_tokens: int, ways: int) -> Iterator[list[int]]:
    """Rows by length, each forward within ``max_tokens`` padded tokens or one row, for each of the ``ways`` workers
    or threads that share it."""
    order = sorted(range(len(split)), key=lambda row: split.lengths[row], reverse=True)
    start = 0
    while start < len(order):
        rows = order[start : start + ways * max(1, max_tokens // split.lengths[order[start]])]
        start += len(rows)
        yield rows


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
    """What one forward says of its rows: exact match, target NLL, and the best answer's place (ranking only)."""

    exact: list[bool]
    nll: list[float]
    ranked: list[int]


def _by_target(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    rows: list[int],
    owner: list[int],
) -> Judged:
    """The right target is fed. Answers of one token each are read off the logits in front of it."""
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
    """Every answer is fed after the input's cache, so that longer answers cost the input only once."""
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
