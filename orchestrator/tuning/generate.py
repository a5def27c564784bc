"""Generation of texts for a split, several prompts in one batch, and the metrics of those texts.

Shapes: B rows, K prompts, N beams of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orchestrator.data.batches import longest_first
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.data.outcomes.rows import Measured
from orchestrator.models.backbone import Backbone, PreparedPrompts
from orchestrator.models.decoding import decode, start
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.custom_metrics import Judgement, custom_values
from orchestrator.tuning.forwards import MAX_TOKENS, Share, SharedForwards
from orchestrator.tuning.meter import Meter
from orchestrator.tuning.text_metrics import References, row_scores, text_metrics
from orchestrator.tuning.worker_group import Group


@dataclass(frozen=True)
class Decoding:
    """Settings of the generation of texts."""

    max_tokens: int
    """Maximum number of tokens in a text, end token included."""
    num_beams: int = 1
    """Number of beams; one beam is greedy decoding."""


def generated_metrics(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    decoding: Decoding,
    max_tokens: int | None = None,
    group: Group = Group(),
    threads: Threads = Threads(),
    metric: str | None = None,
    by_row: bool = False,
    meter: Meter = Meter(),
) -> list[dict[str, float]]:
    """Return the text metrics of each of the K prompts on all rows.

    ``prompts=None`` gives one entry, for the model without a prompt. ``metric`` is one of the
    user's own, to be computed too. With ``by_row`` the outcomes of all rows come with the metrics.
    """
    texts = generate(
        backbone, prompts, split.inputs, encoder, decoding, max_tokens, group, threads, meter
    )
    found = group.led(lambda: [_measured(made, split.references, by_row) for made in texts])
    if metric is None:
        return found
    judgements = [Judgement(made, split.references, None) for made in texts]
    values = custom_values(metric, judgements, group)
    for metrics, value in zip(found, values, strict=True):
        metrics[metric] = value
    return found


def _measured(texts: Sequence[str], references: References, by_row: bool) -> dict[str, float]:
    metrics = text_metrics(texts, references)
    if not by_row:
        return metrics
    return Measured.with_outcomes(metrics, row_scores(texts, references))


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Sequence[int]],
    encoder: Encoder,
    decoding: Decoding,
    max_tokens: int | None = None,
    group: Group = Group(),
    threads: Threads = Threads(),
    meter: Meter = Meter(),
) -> list[list[str]]:
    """Generate a text for each input with each of the K prompts.

    The texts are without special tokens and stripped. ``max_tokens`` is the maximum number of
    padded tokens in a batch, by default MAX_TOKENS. The workers of a ``group``, and the ``threads``
    of each worker, share each batch's rows; every worker gets all texts. Raises NoRoom when memory
    runs out.
    """
    assert encoder.end_id is not None  # a masked model generates nothing
    count = 1 if prompts is None else prompts.count
    parts = group.gathered(
        group.together(
            lambda: _own_texts(
                backbone, prompts, inputs, encoder, decoding, max_tokens, group, threads, meter
            )
        )
    )
    made = {place: text for part in parts for place, text in part.items()}
    return [[made[prompt, row] for row in range(len(inputs))] for prompt in range(count)]


def _own_texts(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Sequence[int]],
    encoder: Encoder,
    decoding: Decoding,
    max_tokens: int | None,
    group: Group,
    threads: Threads,
    meter: Meter,
) -> dict[tuple[int, int], str]:
    """Generate the texts of this worker's rows, by prompt and row."""
    count = 1 if prompts is None else prompts.count
    before = decoding.max_tokens + (0 if prompts is None else prompts.width)
    lengths, copies = [len(ids) + before for ids in inputs], count * decoding.num_beams
    most = (MAX_TOKENS if max_tokens is None else max_tokens) // (copies * threads.ways)
    batches = list(longest_first(lengths, most, group.size * threads.ways))

    @torch.inference_mode()
    def add_texts(share: Share, texts: dict[tuple[int, int], str]) -> None:
        owner = [prompt for prompt in range(count) for _ in share.rows]
        state = start(backbone, prompts, [inputs[row] for row in share.rows] * count, owner)
        made = group.decoded(
            state,
            lambda state: decode(
                state, encoder.end_id or 0, decoding.max_tokens, decoding.num_beams
            ),
        )
        if share.counts:
            places = zip(owner, [*share.rows] * count, strict=True)
            texts.update(zip(places, (_text(encoder, ids) for ids in made), strict=True))

    meter.begin("generating", len(inputs))
    parts = SharedForwards(batches, lengths, group, threads, copies, meter).run(dict, add_texts)
    return {place: text for texts in parts for place, text in texts.items()}


def _text(encoder: Encoder, ids: Sequence[int]) -> str:
    # Cleaning up spaces ("a ." to "a.") would change the generated text.
    text = encoder.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()
