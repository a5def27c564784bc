"""Texts that prompts generate for a split, and the metrics of those texts; several prompts in one batch.

Shapes: B rows, K prompts, N beams of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.models.backbone import Backbone, PreparedPrompts
from orchestrator.models.decoding import decode, start
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.out_of_memory import needs_room
from orchestrator.tuning.text_metrics import text_metrics
from orchestrator.tuning.worker_group import Group

MAX_TOKENS = 16384  # padded tokens that a batch's keys and values may grow to


@dataclass(frozen=True)
class Decoding:
    """How texts are generated: at most ``max_tokens`` tokens, end token included; one beam is greedy decoding."""

    max_tokens: int
    num_beams: int = 1


def generated_metrics(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    split: Encoded,
    encoder: Encoder,
    decoding: Decoding,
    max_tokens: int | None = None,
    group: Group = Group(),
    threads: Threads = Threads(),
) -> list[dict[str, float]]:
    """Text metrics of each of the K prompts on all rows; ``None`` is the model without a prompt, as one entry."""
    texts = generate(backbone, prompts, split.inputs, encoder, decoding, max_tokens, group, threads)
    return group.led(lambda: [text_metrics(made, split.references) for made in texts])


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
) -> list[list[str]]:
    """For each of the K prompts the text that it generates for each input, without special tokens, stripped.

    ``max_tokens``: padded tokens of a batch at most, MAX_TOKENS unless given. Raises NoRoom when memory runs out. The
    workers of a ``group`` share each batch's rows, and so do a worker's ``threads``; all get all texts.
    """
    assert encoder.end_id is not None  # a masked model generates nothing
    count = 1 if prompts is None else prompts.count
    parts = group.gathered(
        group.together(
            lambda: _own_texts(
                backbone, prompts, inputs, encoder, decoding, max_tokens, group, threads
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
) -> dict[tuple[int, int], str]:
    """The texts of this worker's rows, by prompt and row."""
    count = 1 if prompts is None else prompts.count
    before = decoding.max_tokens + (0 if prompts is None else prompts.width)
    lengths, copies = [len(ids) + before for ids in inputs], count * decoding.num_beams
    most = (MAX_TOKENS if max_tokens is None else max_tokens) // (copies * threads.ways)
    batches = list(_batches(lengths, most, group.size * threads.ways))

    @torch.inference_mode()
    def part_texts(part: int) -> dict[tuple[int, int], str]:
        texts: dict[tuple[int, int], str] = {}
        for batch in batches:
            own = threads.share(group.share(batch))[part]
            rows = own or (
                batch[:1] if threads.ways == 1 else []
            )  # all workers run as many forwards
            if not rows:
                continue
            owner = [prompt for prompt in range(count) for _ in rows]
            tokens = copies * len(rows) * max(lengths[row] for row in rows)
            with needs_room(tokens, divisible=len(rows) > 1 or threads.ways > 1):
                state = start(backbone, prompts, [inputs[row] for row in rows] * count, owner)
                made = group.decoded(
                    state,
                    lambda state: decode(
                        state, encoder.end_id or 0, decoding.max_tokens, decoding.num_beams
                    ),
                )
            if own:
                places = zip(owner, [*rows] * count, strict=True)
                texts.update(zip(places, (_text(encoder, ids) for ids in made), strict=True))
        return texts

    return {place: text for texts in threads.each(part_texts) for place, text in texts.items()}


def _text(encoder: Encoder, ids: Sequence[int]) -> str:
    # Cleaned-up spaces ("a ." to "a.") would be another text than the one that was generated.
    text = encoder.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()


def _batches(lengths: Sequence[int], max_tokens: int, ways: int = 1) -> Iterator[list[int]]:
    """Row numbers by length, longest first, each batch within ``max_tokens`` padded tokens or one row, for each of the
    ``ways`` workers that share it."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    start_at = 0
    while start_at < len(order):
        rows = order[start_at : start_at + ways * max(1, max_tokens // lengths[order[start_at]])]
        start_at += len(rows)
        yield rows
