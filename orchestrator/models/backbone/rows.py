"""Padded token rows. Shapes: B rows, T columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Padded rows, each with its prompt.

    ``ids`` [B, T] (negative entries are virtual tokens, see ``models.placeholders``), ``mask`` [B, T] true at real
    columns, ``prompt`` [B] index of the row's prompt.
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
        """Sequences of any lengths, padded with id 0 on the left, so that all end at the right edge, or on the right.

        Any id of the table will do where the mask is false; a tokenizer's own pad may lie outside it.
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
