"""Find the words nearest to a prompt's virtual tokens.

``nearest_words`` needs no loaded model: it reads the embedding table from the file on disk.

Shapes: P virtual tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.models.source import ModelSource

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
    targets = torch.from_numpy(np.ascontiguousarray(embeddings))
    size = len(tokenizer)  # tables are padded to round sizes
    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if (name := _table(weights, size, targets.shape[1])) is not None:
                rows = partial(_slice, weights.get_slice(name))
                return [
                    [(tokenizer.decode([index]), round(distance, 4)) for index, distance in near]
                    for near in nearest_rows(targets, rows, size, count)
                ]
    return []


def _table(weights: safe_open, vocabulary: int, width: int) -> str | None:
    for name in sorted(weights.keys()):
        parts = name.split(".")
        if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in TABLES:
            rows, columns = (*weights.get_slice(name).get_shape(), 0)[:2]
            if rows >= vocabulary and columns == width:
                return str(name)
    return None


def _slice(table: Any, start: int, end: int) -> Tensor:
    part: Tensor = table[start:end]
    return part


def nearest_rows(
    embeddings: Tensor, rows: Callable[[int, int], Tensor], size: int, count: int
) -> list[list[tuple[int, float]]]:
    """Return the ``count`` rows of a table that are nearest to each embedding of [P, H].

    Each is an index with its cosine distance, the nearest first. An embedding of zeros has no
    direction, and no nearest rows. ``rows(start, end)`` reads a part
    of the table's ``size`` rows; the table is read once, in parts.
    """
    directions = normalize(embeddings.float(), dim=1)
    best = torch.empty(len(directions), 0, device=directions.device)
    indices = torch.empty(len(directions), 0, dtype=torch.long, device=directions.device)
    for start in range(0, size, CHUNK):
        end = min(start + CHUNK, size)
        cosines = directions @ normalize(rows(start, end).float(), dim=1).T
        candidates = torch.cat([best, cosines], dim=1)
        best, best_columns = candidates.topk(min(count, candidates.shape[1]), dim=1)
        ids = torch.arange(start, end, device=directions.device).expand(len(directions), -1)
        indices = torch.cat([indices, ids], dim=1).gather(1, best_columns)
    neighbours = []
    columns = zip(directions.any(1).tolist(), indices.tolist(), best.tolist(), strict=True)
    for has_direction, row_indices, cosines_of_rows in columns:
        pairs = zip(row_indices, cosines_of_rows, strict=True) if has_direction else ()
        neighbours.append([(index, 1 - cosine) for index, cosine in pairs])
    return neighbours
