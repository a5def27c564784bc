"""Token rows, padded to one width. Shapes: B rows, T columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def pad_right(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Return the sequences as one tensor [B, T], filled up on the right with ``value``."""
    width = max(map(len, sequences))
    rows = [[*sequence, *[value] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class Rows:
    """Padded rows, each with the index of its prompt.

    ``ids`` [B, T] are token ids; negative entries are virtual tokens (see ``models.placeholders``).
    ``mask`` [B, T] is true at real columns. ``prompt`` [B] is the index of the row's prompt.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor

    @classmethod
    def pad(
        cls,
        sequences: Sequence[Sequence[int]],
        prompt: Sequence[int],
        device: torch.device,
        left: bool = True,
    ) -> Rows:
        """Pad sequences of any lengths with id 0, on the left or on the right.

        Rows padded on the left all end at the right edge. The padding id only needs an embedding,
        because the mask hides the padding. A tokenizer's own pad token may have none.
        """
        width = max(map(len, sequences))
        fill = [[0] * (width - len(sequence)) for sequence in sequences]
        both = zip(fill, sequences, strict=True)
        ids = [[*pads, *sequence] if left else [*sequence, *pads] for pads, sequence in both]
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)[:, None]
        column = torch.arange(width, device=device)[None, :]
        mask = column >= width - lengths if left else column < lengths
        return cls(
            torch.tensor(ids, device=device, dtype=torch.long),
            mask,
            torch.tensor(list(prompt), device=device),
        )
