"""What encoder-decoder and masked models are trained on: documents with parts taken out, or cut in two.

Span corruption and the sentinels that mark the spans are T5's (Raffel et al. 2020, section 3.1.4), cutting in two is
the prefix LM objective of LM adaptation (Lester et al. 2021, section 3.2). Labels are taken out far more often than
other tokens, since there is little of them: without that, a model this small would learn to spell and not to label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from orchestrator.models.builtin.language_model import Row

SPAN = 3  # mean length of a random span
CORRUPTED = 0.15  # share of tokens in random spans, before labels are added
LABELS_OUT = 0.6  # chance of a label to be taken out
IGNORED = -100  # as torch's cross-entropy has it


@dataclass(frozen=True)
class Pair:
    """What an encoder reads, and what is to be said: by a decoder, or at the masked places (IGNORED elsewhere)."""

    ids: list[int]
    targets: list[int]
    weights: list[float]  # of each target in the loss


def taken_out(random: Random, row: Row, label_weight: float) -> list[bool]:
    """Which tokens are taken out: some of the labels, and random spans."""
    length = len(row.ids)
    out = [weight == label_weight and random.random() < LABELS_OUT for weight in row.weights]
    for _ in range(max(1, round(CORRUPTED * length / SPAN))):
        start = random.randrange(length)
        span = range(start, min(length, start + random.randint(1, 2 * SPAN - 1)))
        if not any(
            row.weights[place] == label_weight for place in span
        ):  # a label's neighbours tell which it is
            for place in span:
                out[place] = True
    return out


def span_corrupted(
    random: Random, row: Row, label_weight: float, sentinels: Sequence[int], end: int
) -> Pair:
    """Each run of tokens that are taken out becomes a sentinel; the target names each sentinel with its tokens."""
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    marks = iter(sentinels)
    text_weight = min(row.weights)
    for out, run in groupby(
        enumerate(taken_out(random, row, label_weight)), key=lambda pair: pair[1]
    ):
        places = [place for place, _ in run]
        mark = next(marks, None) if out else None
        if mark is None:  # sentinels are used up, or nothing was taken out here
            ids += [row.ids[place] for place in places]
            continue
        ids.append(mark)
        targets += [mark, *(row.ids[place] for place in places)]
        weights += [text_weight, *(row.weights[place] for place in places)]
    return Pair([*ids, end], [*targets, end], [*weights, text_weight])


def cut_in_two(random: Random, row: Row, label_weight: float, end: int) -> Pair:
    """The first part is read and the rest said.

    Half of the cuts are in front of a label, and half of these texts end behind it, as targets of tasks do.
    """
    starts = [
        place
        for place in range(1, len(row.ids))
        if row.weights[place] == label_weight and row.weights[place - 1] != label_weight
    ]
    ids, weights = row.ids, row.weights
    if starts and random.random() < 0.5:
        cut = random.choice(starts)
        if random.random() < 0.5:
            stop = next((p for p in range(cut, len(ids)) if weights[p] != label_weight), len(ids))
            ids, weights = ids[:stop], weights[:stop]
    else:
        cut = random.randrange(1, len(ids))
    return Pair([*ids[:cut], end], [*ids[cut:], end], [*weights[cut:], min(row.weights)])


def masked(random: Random, row: Row, label_weight: float, begin: int, end: int, mask: int) -> Pair:
    """Tokens that are taken out become masks, and are to be said in their place."""
    out = taken_out(random, row, label_weight)
    ids = [mask if gone else token for gone, token in zip(out, row.ids, strict=True)]
    said = [token if gone else IGNORED for gone, token in zip(out, row.ids, strict=True)]
    return Pair([begin, *ids, end], [IGNORED, *said, IGNORED], [0.0, *row.weights, 0.0])
