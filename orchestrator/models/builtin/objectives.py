"""Training objectives of encoder-decoder and masked models.

Parts of a document are taken out, or the document is cut in two. Span corruption, with the
sentinels that mark the spans, is T5's (Raffel et al. 2020, section 3.1.4). Cutting in two is the
prefix LM objective of LM adaptation (Lester et al. 2021, section 3.2). Labels are taken out far
more often than other tokens, because there are few of them. Otherwise a model this small would
learn to spell and not to label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from orchestrator.models.builtin.language_model import Row

SPAN = 3  # mean length of a random span
CORRUPTED = 0.15  # share of tokens in random spans, before labels are added
LABELS_OUT = 0.6  # probability that a label is taken out
IGNORED = -100  # the index that torch's cross-entropy ignores by default


@dataclass(frozen=True)
class Pair:
    """An encoder's input, and the targets to predict.

    The targets are predicted by a decoder, or at the masked places, with IGNORED at other places.
    """

    ids: list[int]
    targets: list[int]
    weights: list[float]  # each target's weight in the loss


def taken_out(random: Random, row: Row, label_weight: float) -> list[bool]:
    """Choose the tokens that are taken out: some of the labels, and random spans."""
    length = len(row.ids)
    removed = [weight == label_weight and random.random() < LABELS_OUT for weight in row.weights]
    for _ in range(max(1, round(CORRUPTED * length / SPAN))):
        start = random.randrange(length)
        span = range(start, min(length, start + random.randint(1, 2 * SPAN - 1)))
        # Spare spans around a label, because a label's neighbours help to predict it.
        if not any(row.weights[index] == label_weight for index in span):
            for index in span:
                removed[index] = True
    return removed


def span_corrupted(
    random: Random, row: Row, label_weight: float, sentinels: Sequence[int], end: int
) -> Pair:
    """Replace each run of tokens that are taken out by a sentinel.

    The target is each sentinel followed by the tokens that it replaces.
    """
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    marks = iter(sentinels)
    text_weight = min(row.weights)
    for removed, run in groupby(
        enumerate(taken_out(random, row, label_weight)), key=lambda pair: pair[1]
    ):
        indices = [index for index, _ in run]
        mark = next(marks, None) if removed else None
        if mark is None:  # sentinels are used up, or nothing was taken out here
            ids += [row.ids[index] for index in indices]
            continue
        ids.append(mark)
        targets += [mark, *(row.ids[index] for index in indices)]
        weights += [text_weight, *(row.weights[index] for index in indices)]
    return Pair([*ids, end], [*targets, end], [*weights, text_weight])


def cut_in_two(random: Random, row: Row, label_weight: float, end: int) -> Pair:
    """Cut a row in two: the first part is the input, the rest is the target.

    Half of the cuts are in front of a label. In half of these, the text ends after the label, as a
    task's target does.
    """
    starts = [
        index
        for index in range(1, len(row.ids))
        if row.weights[index] == label_weight and row.weights[index - 1] != label_weight
    ]
    ids, weights = row.ids, row.weights
    if starts and random.random() < 0.5:
        boundary = random.choice(starts)
        if random.random() < 0.5:
            stop = next(
                (p for p in range(boundary, len(ids)) if weights[p] != label_weight), len(ids)
            )
            ids, weights = ids[:stop], weights[:stop]
    else:
        boundary = random.randrange(1, len(ids))
    return Pair(
        [*ids[:boundary], end], [*ids[boundary:], end], [*weights[boundary:], min(row.weights)]
    )


def masked(random: Random, row: Row, label_weight: float, begin: int, end: int, mask: int) -> Pair:
    """Replace tokens that are taken out by masks, and predict them there."""
    removed = taken_out(random, row, label_weight)
    ids = [
        mask if is_removed else token for is_removed, token in zip(removed, row.ids, strict=True)
    ]
    targets = [
        token if is_removed else IGNORED for is_removed, token in zip(removed, row.ids, strict=True)
    ]
    return Pair([begin, *ids, end], [IGNORED, *targets, IGNORED], [0.0, *row.weights, 0.0])
