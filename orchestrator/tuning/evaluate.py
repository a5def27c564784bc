"""Metrics of prompts on a split, computed for several prompts in one forward, without gradients.

* ``accuracy``: share of rows where the verbalizer's text with the highest log-probability is the
  right one.
* ``exact_match``: share of rows where greedy decoding gives exactly the target's tokens and then
  the end token. Text outside the verbalizer counts as wrong.
* ``loss``: mean negative log-likelihood of the target tokens.
* the metric that was asked for, if it is another one of labels or of the user's own
  (``custom_metrics.py``); all metrics of labels, if everything was (``data/outcomes``).

If a ``Decoding`` is given, texts are also generated and compared (``generate.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.batches import longest_first
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.data.outcomes.label_metrics import (
    CALIBRATION_BINS,
    Counts,
    Scores,
    calibration_counts,
    calibration_error,
    count_metrics,
    roc_auc,
)
from orchestrator.data.outcomes.rows import (
    EXACT,
    GIVEN,
    LOG_PROBS,
    NLL,
    TOKENS,
    TRUE,
    Measured,
    RowOutcomes,
    outcomes_of,
)
from orchestrator.job.metrics import Metric, is_custom, metric_named
from orchestrator.models.answer_tree import AnswerTrees
from orchestrator.models.backbone import Backbone, PreparedPrompts, PromptTensors
from orchestrator.models.ranking import rank
from orchestrator.models.scoring import (
    answer_scores,
    answer_tokens,
    ranks_as_tree,
    target_log_probs,
)
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.custom_metrics import Judgement, custom_values
from orchestrator.tuning.forwards import MAX_TOKENS, Share, SharedForwards
from orchestrator.tuning.generate import Decoding, generated_metrics
from orchestrator.tuning.meter import Meter
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.reports import CONFUSION
from orchestrator.tuning.worker_group import Group

CPU_TOKENS = 2048  # on a CPU, outgrowing the caches costs more than running more forwards


@dataclass(frozen=True)
class Wanted:
    """The metrics to report besides ``exact_match``, ``loss`` and, with labels, ``accuracy``."""

    metric: Metric | None = None
    """One more metric; metrics of generated texts are reported anyway."""
    everything: bool = False
    """Report all metrics of labels, the counts of answers, and the outcomes of all rows."""

    @classmethod
    def of(cls, metric: str | None, everything: bool) -> Wanted:
        return cls(None if metric is None else metric_named(metric), everything)

    @property
    def keeps_scores(self) -> bool:
        """True if the probabilities of all rows have to be kept until the end."""
        return self.everything or (self.metric is not None and self.metric.needs_scores)

    @property
    def needs_scores(self) -> bool:
        """True if a metric is computed from the probabilities of all answers."""
        return self.keeps_scores or self.includes("ece")

    def includes(self, name: str) -> bool:
        return self.everything or (self.metric is not None and self.metric.name == name)


@dataclass
class Ranked:
    """The labels that were given to rows so far, as sums over the rows.

    The rows themselves are kept only for metrics that need all of them.
    """

    counts: Counts
    """Number of rows by true and given label, [C, C]."""
    calibration: Scores = field(default_factory=lambda: np.zeros((3, CALIBRATION_BINS)))
    """As ``calibration_counts`` returns it."""
    rows: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    """Log-probabilities of the labels, [rows of a forward, C] each, in float32."""

    @classmethod
    def nothing(cls, labels: int) -> Ranked:
        return cls(np.zeros((labels, labels), dtype=np.int64))

    def add(
        self, rows: Sequence[int], true: Sequence[int], judged: RankedRows, keeps: bool
    ) -> None:
        given = np.asarray(judged.given)
        np.add.at(self.counts, (np.asarray(true), given), 1)
        if judged.scores is None:
            return
        confidences = np.exp(judged.scores.max(1))
        self.calibration += calibration_counts(confidences, given == np.asarray(true))
        if keeps:
            self.rows += rows
            self.given += judged.given
            self.scores.append(judged.scores.astype(np.float32))

    def __add__(self, other: Ranked) -> Ranked:
        return Ranked(
            self.counts + other.counts,
            self.calibration + other.calibration,
            self.rows + other.rows,
            self.given + other.given,
            self.scores + other.scores,
        )

    def metrics(self, labels: Sequence[int], wanted: Wanted) -> dict[str, float]:
        """Return the accuracy and the metrics of labels that are wanted and defined.

        ``labels`` are the right labels of all rows of the split.
        """
        accuracy = float(np.trace(self.counts)) / float(self.counts.sum())
        every = count_metrics(self.counts)
        if wanted.includes("ece"):
            every |= {"ece": calibration_error(self.calibration)}
        if wanted.includes("roc_auc"):
            area = roc_auc([labels[row] for row in self.rows], np.concatenate(self.scores))
            every |= {} if area is None else {"roc_auc": area}
        chosen = {name: value for name, value in every.items() if wanted.includes(name)}
        return {"accuracy": accuracy, **chosen}

    def confusion(self) -> dict[str, float]:
        """Return the counts that are not 0, as metrics."""
        return {
            f"{CONFUSION}{true}/{given}": float(self.counts[true, given])
            for true, given in np.argwhere(self.counts).tolist()
        }

    def columns(self, labels: Sequence[int]) -> dict[str, Scores]:
        """Return the outcomes of all rows in their order."""
        order = np.argsort(self.rows)
        return {
            TRUE: np.asarray(labels),
            GIVEN: np.asarray(self.given)[order],
            LOG_PROBS: np.concatenate(self.scores)[order],
        }

    def judgement(self, split: Encoded, encoder: Encoder) -> Judgement:
        """Return all rows in their order, for a metric of the user's own."""
        assert encoder.verbalizer is not None  # the rows have labels
        labels, order = encoder.verbalizer.labels, np.argsort(self.rows)
        scores = np.exp(np.concatenate(self.scores)[order].astype(np.float64))
        return Judgement(
            [labels[self.given[place]] for place in order],
            [labels[split.labels[self.rows[place]]] for place in order],
            scores,
        )


@dataclass
class Tally:
    """Running sums of one prompt over the rows seen so far."""

    rows: int = 0
    exact: int = 0
    """Rows whose greedy decoding is exactly the target."""
    nll: float = 0.0
    tokens: int = 0
    """Number of target tokens."""
    ranked: Ranked = field(default_factory=lambda: Ranked.nothing(0))
    kept: list[tuple[int, bool, float]] = field(default_factory=list)
    """Each row's index, whether its target is exact, and its negative log-likelihood; empty unless
    all rows are wanted."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows + other.rows,
            self.exact + other.exact,
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.ranked + other.ranked,
            self.kept + other.kept,
        )

    @property
    def has_labels(self) -> bool:
        return len(self.ranked.counts) > 0

    def metrics(self, split: Encoded, wanted: Wanted) -> dict[str, float]:
        metrics = {
            **(self.ranked.metrics(split.labels, wanted) if self.has_labels else {}),
            "exact_match": self.exact / self.rows,
            "loss": self.nll / self.tokens,
        }
        if not wanted.everything:
            return metrics
        return Measured.with_outcomes({**metrics, **self.ranked.confusion()}, self.outcomes(split))

    def outcomes(self, split: Encoded) -> RowOutcomes:
        """Return the outcomes of all rows in their order."""
        _, exact, nll = zip(*sorted(self.kept), strict=True)
        return RowOutcomes(
            {
                **(self.ranked.columns(split.labels) if self.has_labels else {}),
                EXACT: np.asarray(exact),
                NLL: np.asarray(nll),
                TOKENS: np.asarray([len(ids) for ids in split.targets]),
            }
        )


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
    metric: str | None = None,
    meter: Meter = Meter(),
) -> list[dict[str, float]]:
    """Return the metrics of each prompt on all rows of a split.

    ``prompts=None`` gives one entry, for the model without a prompt. With ``decoding``, texts are
    generated as well and their metrics are added; the split must then have references.
    ``max_tokens`` is the maximum number of padded tokens in a forward; by default it depends on the
    device. ``confusion`` is as in ``EvaluationJob``, and the rows' outcomes then come with the
    metrics (``outcomes_of``). ``metric`` is reported as well, if the task has it and it is defined.
    The workers of a ``group``, and the ``threads`` of each worker, share each forward's rows; every
    worker gets the metrics over all rows. Raises NoRoom when memory runs out, and MetricFailed for
    a metric of the user's own.
    """
    most = max_tokens or forward_tokens(backbone)
    wanted = Wanted.of(metric, confusion)
    prepared, tallies = group.together(
        lambda: _own_tallies(backbone, prompts, split, encoder, wanted, most, group, threads, meter)
    )
    parts = group.gathered(tallies)
    whole = [sum(of_prompt[1:], of_prompt[0]) for of_prompt in zip(*parts, strict=True)]
    found = [tally.metrics(split, wanted) for tally in whole]
    own = metric if metric is not None and is_custom(metric) else None
    if decoding is not None:
        more = generated_metrics(
            backbone,
            prepared,
            split,
            encoder,
            decoding,
            max_tokens,
            group,
            threads,
            own,
            confusion,
            meter,
        )
    elif own is not None and encoder.answers:
        judgements = [tally.ranked.judgement(split, encoder) for tally in whole]
        more = [{own: value} for value in custom_values(own, judgements, group)]
    else:
        return found
    return [_together(metrics, others) for metrics, others in zip(found, more, strict=True)]


def _together(metrics: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """Join two parts of a prompt's metrics, and the outcomes that came with them."""
    both = {**metrics, **others}
    if (outcomes := outcomes_of(metrics)) is None:
        return both
    return Measured.with_outcomes(both, outcomes.joined(outcomes_of(others)))


def _own_tallies(
    backbone: Backbone,
    prompts: Sequence[Tensor | PromptTensors] | None,
    split: Encoded,
    encoder: Encoder,
    wanted: Wanted,
    max_tokens: int,
    group: Group,
    threads: Threads,
    meter: Meter,
) -> tuple[PreparedPrompts | None, list[Tally]]:
    """Prepare the prompts and tally each of them over this worker's rows."""
    count = 1 if prompts is None else len(prompts)
    with needs_room():
        prepared = None if prompts is None else backbone.prepare(prompts)
    forwards = list(longest_first(split.lengths, max_tokens // count, group.size * threads.ways))
    judge = _judge_of(backbone, encoder, wanted)

    @torch.inference_mode()
    def add_tallies(share: Share, tallies: list[Tally]) -> None:
        rows = [row for _ in range(count) for row in share.rows]
        owner = [prompt for prompt in range(count) for _ in share.rows]
        judged = judge(backbone, prepared, split, encoder, rows, owner)
        if share.counts:
            _tally(judged, split, rows, owner, tallies, wanted)

    meter.begin("evaluating", len(split))
    parts = SharedForwards(forwards, split.lengths, group, threads, count, meter).run(
        lambda: [Tally(ranked=Ranked.nothing(len(encoder.answers))) for _ in range(count)],
        add_tallies,
    )
    return prepared, [sum(of_prompt[1:], of_prompt[0]) for of_prompt in zip(*parts, strict=True)]


def forward_tokens(backbone: Backbone) -> int:
    """Return the default maximum number of padded tokens in one forward."""
    return min(MAX_TOKENS, CPU_TOKENS) if backbone.device.type == "cpu" else MAX_TOKENS


def _judge_of(backbone: Backbone, encoder: Encoder, wanted: Wanted) -> Judge:
    """Choose how the rows of an evaluation are judged."""
    answers = encoder.scored_answers
    if all(len(ids) == 1 for ids in answers):
        return _by_target
    if ranks_as_tree(backbone):
        return _ByTree(AnswerTrees.of([answers], backbone.device), wanted.needs_scores)
    return _by_answers if backbone.continues else _by_target


def _tally(
    judged: Judged,
    split: Encoded,
    rows: list[int],
    owner: list[int],
    tallies: list[Tally],
    wanted: Wanted,
) -> None:
    """Add a forward's rows to the tallies of their prompts."""
    for place, (row, prompt) in enumerate(zip(rows, owner, strict=True)):
        tally = tallies[prompt]
        tally.rows += 1
        tally.exact += judged.exact[place]
        tally.nll += judged.nll[place]
        tally.tokens += len(split.targets[row])
        if wanted.everything:
            tally.kept.append((row, judged.exact[place], judged.nll[place]))
    if judged.answers is None:
        return
    owners = np.asarray(owner)
    for prompt, tally in enumerate(tallies):
        places = np.flatnonzero(owners == prompt).tolist()
        own = [rows[place] for place in places]
        true = [split.labels[row] for row in own]
        tally.ranked.add(own, true, judged.answers.part(places), wanted.keeps_scores)


@dataclass(frozen=True)
class Judged:
    """The results of one forward, one entry per row."""

    exact: list[bool]
    """True if greedy decoding gives exactly the target."""
    nll: list[float]
    """Negative log-likelihood of the target."""
    answers: RankedRows | None = None
    """The ranking of the answers; None without answers to rank."""


@dataclass(frozen=True)
class RankedRows:
    """The ranking of the answers for the rows of one forward."""

    given: list[int]
    """Index of the most likely answer of each row."""
    scores: Scores | None
    """Log-probability [B, C] of each answer, among the answers; None where nobody needs them."""

    @classmethod
    def of(cls, scores: Tensor) -> RankedRows:
        """Rank answers by scores [B, C]: their logits, or their sums of log-probabilities."""
        among_answers = scores.cpu().double().log_softmax(-1)
        return cls(scores.argmax(-1).tolist(), among_answers.numpy())

    def part(self, places: Sequence[int]) -> RankedRows:
        scores = None if self.scores is None else self.scores[list(places)]
        return RankedRows([self.given[place] for place in places], scores)


class Judge(Protocol):
    """A way to judge rows, each with the index of its prompt (``owner``)."""

    def __call__(
        self,
        backbone: Backbone,
        prompts: PreparedPrompts | None,
        split: Encoded,
        encoder: Encoder,
        rows: list[int],
        owner: list[int],
    ) -> Judged: ...


@dataclass(frozen=True)
class _ByTree:
    """Judge rows by feeding the right target, and other answers as a tree of their tokens.

    Without ``every``, answers that can't be the likeliest are not scored.
    """

    tree: AnswerTrees
    every: bool

    def __call__(
        self,
        backbone: Backbone,
        prompts: PreparedPrompts | None,
        split: Encoded,
        encoder: Encoder,
        rows: list[int],
        owner: list[int],
    ) -> Judged:
        inputs, targets = [split.inputs[row] for row in rows], [split.targets[row] for row in rows]
        trees = self.tree.select(torch.zeros(len(rows), dtype=torch.long, device=backbone.device))
        right = targets, [split.labels[row] for row in rows]
        ranking = rank(backbone, prompts, inputs, owner, trees, right, self.every)
        exact, nll = _of_targets(ranking.logits, ranking.targets)
        if self.every:
            return Judged(exact, nll, RankedRows.of(ranking.scores))
        return Judged(exact, nll, RankedRows(ranking.given.tolist(), None))


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[list[bool], list[float]]:
    """Return whether each target is exact, and its negative log-likelihood."""
    exact = ((logits.argmax(-1) == targets) | (targets < 0)).all(1)
    return exact.tolist(), (-target_log_probs(logits, targets).sum(1)).tolist()


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
    exact, nll = _of_targets(logits, wanted)
    answers = encoder.scored_answers
    ranked = None
    if answers and all(len(ids) == 1 for ids in answers):
        first = (wanted >= 0).long().argmax(1)
        scores = logits[torch.arange(len(logits), device=logits.device), first][
            :, [ids[0] for ids in answers]
        ]
        ranked = RankedRows.of(scores)
    elif answers:
        scored = answer_scores(backbone, prompts, inputs, owner, [answers] * len(inputs))
        ranked = RankedRows.of(torch.stack(scored))
    return Judged(exact, nll, ranked)


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
    ranked = RankedRows.of((log_probs * counts).sum(1).view(-1, count))
    return Judged(greedy[right].all(1).tolist(), (-log_probs[right].sum(1)).tolist(), ranked)
