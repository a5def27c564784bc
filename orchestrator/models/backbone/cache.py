"""Keys and values that grow in place.

transformers' own cache concatenates all it holds at every step, and once more when it is made from tensors. In
generation of short answers behind long prompts that copying was a third of all the time (docs/decisions.md). Here a
layer's tensors stand at the front of buffers with room for further columns. Not for training: what is written in place
has no gradient.

Shapes: B rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 16  # further columns for each copy of what is there


class RoomyLayer(DynamicLayer):
    """``keys`` and ``values`` [B, heads, C, width] are views of the front of their buffers."""

    def __init__(self, buffers: tuple[Tensor, Tensor] | None = None, columns: int = 0) -> None:
        super().__init__()
        if buffers is not None:
            self.lazy_initialization(*buffers)
            self.buffers = buffers
            self._show(columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns keys and values of all."""
        added = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if start == 0 and not self._fits(end):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.buffers = (room_for(key_states, end), room_for(value_states, end))
        elif not self._fits(end):
            held = (self.keys, self.values)
            self.buffers = (room_for(self.keys, end), room_for(self.values, end))
            self._write(held, 0, start)
        self._write(added, start, end)
        self._show(end)
        return self.keys, self.values

    def _fits(self, columns: int) -> bool:
        """Whether the buffers have room, and may be written here: an inference tensor only in inference mode."""
        if not self.is_initialized or self.buffers[0].shape[2] < columns:
            return False
        return torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()

    def _write(self, tensors: tuple[Tensor, Tensor], start: int, end: int) -> None:
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer[:, :, start:end] = tensor

    def _show(self, columns: int) -> None:
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)


def room_for(like: Tensor, columns: int, rows: int | None = None, room: int = ROOM) -> Tensor:
    """An empty buffer [rows, heads, columns + room, width]. Nobody may read what nobody has written."""
    return like.new_empty(
        len(like) if rows is None else rows, like.shape[1], columns + room, like.shape[3]
    )


def rows_cache(tensors: Sequence[Tensor], rows: Tensor, further: int) -> Cache:
    """A cache that begins with the given rows [B] of keys and values of each layer, and has room for ``further``
    columns."""
    layers = []
    for pair in zip(tensors[::2], tensors[1::2], strict=True):
        columns = pair[0].shape[2]
        layer = RoomyLayer(tuple(room_for(it, columns, len(rows), further) for it in pair), columns)  # type: ignore[arg-type]
        for held, shown in zip(pair, (layer.keys, layer.values), strict=True):
            torch.index_select(held, 0, rows, out=shown)  # straight to its place
        layers.append(layer)
    return Cache(layers=layers)


def empty_cache() -> Cache:
    """A cache that has nothing yet, and makes room as it grows."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def select(cache: Cache, rows: Tensor) -> Cache:
    """The cache of the given rows [B'], in that order, with repetition."""
    return Cache(layers=[_selected(layer, rows) for layer in cache.layers])


def _selected(layer: Any, rows: Tensor) -> RoomyLayer:
    held = layer.buffers if isinstance(layer, RoomyLayer) else (layer.keys, layer.values)
    keys, values = (it.index_select(0, rows) for it in held)
    return RoomyLayer((keys, values), layer.get_seq_length())


def join(caches: Sequence[Cache], masks: Sequence[Tensor]) -> tuple[Cache, Tensor]:
    """The rows of all caches in one, and its mask [B, C]. ``masks`` say which columns of each row are real; these end
    at the right edge then, and C is as much as the longest row needs."""
    width = max(int(mask.sum(1).max()) for mask in masks)
    moves = [_to_the_right(mask, width) for mask in masks]
    layers = [
        RoomyLayer(tuple(_joined(each, moves, name, width) for name in ("keys", "values")), width)  # type: ignore[arg-type]
        for each in zip(*(cache.layers for cache in caches), strict=True)
    ]
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
        rows[:, :, :missing] = 0  # masked, but what isn't a number would stay none
        rows[:, :, missing:] = tensor[:, :, tensor.shape[2] - (width - missing) :]
    return buffer


def _to_the_right(mask: Tensor, width: int) -> tuple[Tensor | None, Tensor]:
    """For each row the columns [B, width] that bring its real ones to the right edge, in their order, or None where
    they are there already; the new mask."""
    column = torch.arange(width, device=mask.device)[None, :]
    moved = column >= width - mask.sum(1, keepdim=True)
    if bool((mask[:, 1:] >= mask[:, :-1]).all()) and bool(mask[:, -1].all()):
        return None, moved
    order = mask.long().argsort(dim=1, stable=True)[:, -width:]
    return torch.nn.functional.pad(
        order, (width - order.shape[1], 0)
    ), moved  # any column will do where it is masked


def _moved(tensor: Tensor, order: Tensor) -> Tensor:
    """Keys or values [B, heads, C, width] with their columns in the given order."""
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)
