"""A cache of keys and values that grows in place.

The cache of transformers concatenates all of its columns at every step, and once more when it is
made from tensors. In the generation of short answers after long prompts, that copying took a third
of the time (docs/decisions/0036-serving-engine.md). Here the tensors of a layer are the
front of larger buffers, which have room for further columns. This cache is not for training: writes
in place have no gradient.

Shapes: B rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 16  # spare columns of a newly allocated buffer


class RoomyLayer(DynamicLayer):
    """A cache layer whose tensors are views of larger buffers.

    ``keys`` and ``values`` [B, heads, C, width] are the front of the buffers.
    """

    def __init__(self, buffers: tuple[Tensor, Tensor] | None = None, columns: int = 0) -> None:
        super().__init__()
        if buffers is not None:
            self.lazy_initialization(*buffers)
            self.buffers = buffers
            self._show(columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; return the keys and values of all columns."""
        added = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if start == 0 and not self._fits(end):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.buffers = (room_for(key_states, end), room_for(value_states, end))
        elif not self._fits(end):
            filled = (self.keys, self.values)
            self.buffers = (room_for(self.keys, end), room_for(self.values, end))
            self._write(filled, 0, start)
        self._write(added, start, end)
        self._show(end)
        return self.keys, self.values

    def _fits(self, columns: int) -> bool:
        """Return whether the buffers have room for so many columns and may be written now.

        Inference tensors may be written in inference mode only.
        """
        if not self.is_initialized or self.buffers[0].shape[2] < columns:
            return False
        return torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()

    def _write(self, tensors: tuple[Tensor, Tensor], start: int, end: int) -> None:
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer[:, :, start:end] = tensor

    def _show(self, columns: int) -> None:
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)


def room_for(like: Tensor, columns: int, rows: int | None = None, room: int = ROOM) -> Tensor:
    """Allocate an uninitialised buffer [rows, heads, columns + room, width].

    Columns have to be written before they are read.
    """
    return like.new_empty(
        len(like) if rows is None else rows, like.shape[1], columns + room, like.shape[3]
    )


def rows_cache(tensors: Sequence[Tensor], rows: Tensor, further: int) -> Cache:
    """Make a cache that starts with the given rows [B] of each layer's keys and values.

    ``tensors`` are key and value of each layer. The cache has room for ``further`` columns.
    """
    layers = []
    for pair in zip(tensors[::2], tensors[1::2], strict=True):
        columns = pair[0].shape[2]
        keys, values = (room_for(tensor, columns, len(rows), further) for tensor in pair)
        layer = RoomyLayer((keys, values), columns)
        for source, target in zip(pair, (layer.keys, layer.values), strict=True):
            torch.index_select(source, 0, rows, out=target)  # copies straight into the buffer
        layers.append(layer)
    return Cache(layers=layers)


def empty_cache() -> Cache:
    """Make an empty cache that allocates buffers as it grows."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def select(cache: Cache, rows: Tensor) -> Cache:
    """Return the cache of the given rows [B'], in that order; a row may appear several times."""
    return Cache(layers=[_selected(layer, rows) for layer in cache.layers])


def crop(cache: Cache, columns: int) -> None:
    """Forget all but the first columns; buffers keep their room."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :columns], layer.values[:, :, :columns]


def _selected(layer: DynamicLayer, rows: Tensor) -> RoomyLayer:
    buffers = layer.buffers if isinstance(layer, RoomyLayer) else (layer.keys, layer.values)
    keys, values = (tensor.index_select(0, rows) for tensor in buffers)
    return RoomyLayer((keys, values), layer.get_seq_length())


def join(caches: Sequence[Cache], masks: Sequence[Tensor]) -> tuple[Cache, Tensor]:
    """Join the rows of all caches in one cache; return it with its mask [B, C].

    ``masks`` mark the real columns of each cache's rows. In the result, the real columns end at the
    right edge, and C is the number of real columns of the longest row.
    """
    width = max(int(mask.sum(1).max()) for mask in masks)
    moves = [_to_the_right(mask, width) for mask in masks]
    layers = []
    for same_layer in zip(*(cache.layers for cache in caches), strict=True):
        keys, values = (_joined(same_layer, moves, name, width) for name in ("keys", "values"))
        layers.append(RoomyLayer((keys, values), width))
    return Cache(layers=layers), torch.cat([mask for _, mask in moves])


def _joined(
    layers: Sequence[RoomyLayer],
    moves: Sequence[tuple[Tensor | None, Tensor]],
    name: str,
    width: int,
) -> Tensor:
    tensors = [getattr(layer, name) for layer in layers]
    buffer = room_for(tensors[0], width, sum(map(len, tensors)))
    first = 0
    for tensor, (order, _) in zip(tensors, moves, strict=True):
        rows = buffer[first : (first := first + len(tensor)), :, :width]
        if order is not None:
            rows.copy_(_moved(tensor, order))
            continue
        missing = max(0, width - tensor.shape[2])
        rows[:, :, :missing] = 0  # these columns are masked, but a NaN would pass through the mask
        rows[:, :, missing:] = tensor[:, :, tensor.shape[2] - (width - missing) :]
    return buffer


def _to_the_right(mask: Tensor, width: int) -> tuple[Tensor | None, Tensor]:
    """Return an order of the columns [B, width], and the mask [B, width] of the reordered rows.

    The order moves each row's real columns to the right edge and keeps their sequence. It is None
    if the real columns are at the right edge already.
    """
    column = torch.arange(width, device=mask.device)[None, :]
    moved = column >= width - mask.sum(1, keepdim=True)
    if bool((mask[:, 1:] >= mask[:, :-1]).all()) and bool(mask[:, -1].all()):
        return None, moved
    order = mask.long().argsort(dim=1, stable=True)[:, -width:]
    # Masked columns may point anywhere, so the order is padded with column 0.
    return torch.nn.functional.pad(order, (width - order.shape[1], 0)), moved


def _moved(tensor: Tensor, order: Tensor) -> Tensor:
    """Return keys or values [B, heads, C, width] with their columns in the given order."""
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)
