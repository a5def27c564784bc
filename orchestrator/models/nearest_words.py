"""Find the words nearest to a prompt's virtual tokens, without loading the model.

The embedding table is read from the weights file on disk.

Shapes: P virtual tokens, H width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.models.source import ModelSource
from orchestrator.models.tokenizer import Tokenizer

TABLES = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
    "embeddings",
    "embedding",
)
"""Names of token embedding tables: the last word before ``weight`` in the tensor's name."""
CHUNK = 8192  # rows of the vocabulary that are compared at a time

Words = list[list[tuple[str, float]]]
"""For each virtual token, its nearest words and their cosine distances, the nearest first."""


def nearest_words(source: ModelSource, embeddings: np.ndarray, count: int) -> Words:
    """Return the ``count`` nearest tokens of each embedding of [P, H], by cosine distance.

    The result is empty if the model's files hold no embedding table of that width.
    """
    tokenizer = source.tokenizer()
    wanted = normalize(torch.from_numpy(np.ascontiguousarray(embeddings)).float(), dim=1)
    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if (name := _table(weights, len(tokenizer), wanted.shape[1])) is not None:
                return _nearest(weights.get_slice(name), tokenizer, wanted, count)
    return []


def _table(weights: safe_open, vocabulary: int, width: int) -> str | None:
    for name in sorted(weights.keys()):
        parts = name.split(".")
        if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in TABLES:
            rows, columns = (*weights.get_slice(name).get_shape(), 0)[:2]
            if rows >= vocabulary and columns == width:
                return str(name)
    return None


def _nearest(table: Any, tokenizer: Tokenizer, wanted: Tensor, count: int) -> Words:
    best, places = torch.empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.long)
    for start in range(0, len(tokenizer), CHUNK):
        end = min(start + CHUNK, len(tokenizer))  # skips padding of the table to a round size
        cosines = wanted @ normalize(table[start:end].float(), dim=1).T
        both = torch.cat([best, cosines], dim=1)
        best, chosen = both.topk(min(count, both.shape[1]), dim=1)
        ids = torch.arange(start, end).expand(len(wanted), -1)
        places = torch.cat([places, ids], dim=1).gather(1, chosen)
    return [
        [
            (tokenizer.decode([place]), round(1 - cosine, 4))
            for place, cosine in zip(*row, strict=True)
        ]
        for row in zip(places.tolist(), best.tolist(), strict=True)
    ]
