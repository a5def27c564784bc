"""Demonstrations: training rows with their answers, written out in front of an input.

This is few-shot prompting (Brown et al. 2020, section 2), the baseline without learning that tuning
has to beat.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from orchestrator.data.control_tokens import TemplateText, WrittenText
from orchestrator.data.encoding import Encoder
from orchestrator.data.source_row import Row
from orchestrator.data.template import Mark, target_text

SEPARATOR = TemplateText("\n\n")


def written_out(encoder: Encoder, row: Row, target: str) -> WrittenText:
    """Write out a row's input text with its answer, at the blank or else at the end."""
    verbalizer = encoder.verbalizer
    if verbalizer is None:
        answer = target_text(row[target])
    else:
        answer = verbalizer.texts[verbalizer.index(row[target])]
    parts = encoder.template.parts(row)
    if not encoder.template.has_blank:
        parts = [*parts, answer]
    texts = (answer if isinstance(part, Mark) and part.is_blank else part for part in parts)
    return WrittenText(text for text in texts if isinstance(text, str))


def joined(texts: Sequence[WrittenText]) -> WrittenText:
    """Join demonstrations, each with a blank line behind it."""
    return WrittenText(part for text in texts for part in (*text.parts, SEPARATOR))


def chosen(encoder: Encoder, rows: Sequence[Row], target: str, count: int, seed: int) -> list[Row]:
    """Choose up to ``count`` rows at random, with labels as balanced as possible.

    Only rows whose whole input fits into ``max_input_tokens`` are chosen.
    """
    order = list(rows)
    random.Random(seed).shuffle(order)
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in order:
        label = encoder.verbalizer.index(row[target]) if encoder.verbalizer else 0
        if len(groups[label]) < count and len(encoder.row_ids(row)) <= encoder.max_input_tokens:
            groups[label].append(row)
        is_full = all(len(group) == count for group in groups.values())
        if groups and is_full and len(groups) == _labels(encoder):
            break
    alternating = []
    for rank in range(count):
        alternating += [group[rank] for group in groups.values() if rank < len(group)]
    return alternating[:count]


def _labels(encoder: Encoder) -> int:
    return len(encoder.verbalizer.labels) if encoder.verbalizer else 1


def demonstrations(
    encoder: Encoder,
    rows: Sequence[Row],
    target: str,
    count: int,
    seed: int,
    fits: Callable[[str], bool],
) -> tuple[str, int]:
    """Return the demonstrations as a text to put in front of inputs, and their number.

    There are at most ``count`` demonstrations, and as many as fit: ``fits`` tells whether there is
    room for a text. If not even one fits, the text is empty.
    """
    texts = [
        written_out(encoder, row, target) for row in chosen(encoder, rows, target, count, seed)
    ]
    for number in range(len(texts), 0, -1):
        text = joined(texts[:number])
        if fits(text):
            return text, number
    return "", 0
