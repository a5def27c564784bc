"""Compute the last block's output only at the columns that are read.

The output of a causal model's last block matters only at columns whose logits are read. Of all
other columns, only keys and values are needed. So the block runs twice. The first run covers all
columns and stops once its attention has handed keys and values to the cache. The second run covers
the wanted columns only, and its attention finds in the cache what the first run left. The numbers
are the same, but queries, the attention's output and the feed-forward part of the block are
computed for a few columns instead of all.

Shapes: B rows, T columns of a forward, S columns of the cache and the forward together, H width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache

from orchestrator.models.backbone.sharding import blocks_of


class LastColumns(Cache):
    """The cache of one forward whose last block computes only the ``keep`` last columns.

    It behaves like any other cache after that forward, and where the block can't be narrowed.
    """

    def __init__(self, cache: Cache, keep: int) -> None:
        super().__init__(
            cache.layers or None, None if cache.layers else cache.layer_class_to_replicate
        )
        self.keep = keep
        self.width = 0
        self._keeping = False
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._kept is not None:  # the first run has cached the wanted columns already
            return self._kept
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if self._keeping:
            self._kept = both
            raise _Kept
        return both

    @property
    def narrowed(self) -> bool:
        """True while the last block runs for the wanted columns."""
        return self._kept is not None

    def keep_keys(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the block until its keys and values are in the cache."""
        self._keeping = True
        try:
            block.forward(*args, **kwargs)
        except _Kept:
            pass
        finally:
            self._keeping = False

    def ended(self) -> None:
        self._kept = None


class _Kept(Exception):
    """Raised to stop the first run of a block once its keys and values are in the cache."""


class _ThreadCache(threading.local):
    """The forward that a thread is running; several threads share one model."""

    cache: LastColumns | None = None


_here = _ThreadCache()


def watch(model: nn.Module) -> None:
    """Install the hooks that let ``reading`` narrow the model's last block.

    Forwards outside ``reading`` stay as they are. A model that has the hooks is left unchanged.
    """
    last = blocks_of(model)[-1]
    if _before not in last._forward_pre_hooks.values():
        last.register_forward_pre_hook(_before, with_kwargs=True)
        last.register_forward_hook(_after)


@contextmanager
def reading(cache: Cache, keep: int) -> Iterator[Cache]:
    """Narrow the last block to the ``keep`` last columns in this thread's forward.

    The block's output has zeros before these columns. The forward has to use the yielded cache, and
    masks of shape [B, 1, T, S] or [B, S].
    """
    before = _here.cache
    _here.cache = narrow = LastColumns(cache, keep)
    try:
        yield narrow
    finally:
        _here.cache = before
        narrow.ended()


def _before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = _here.cache
    if cache is None:
        return None
    cache.width = _width(args, kwargs)
    tensors = [*args, *kwargs.values()]
    if cache.keep >= cache.width or not any(_is_mask(value) for value in tensors):
        # Nothing to save; or there is no mask, and attention would take queries and keys to be of
        # the same columns.
        return None
    cache.keep_keys(block, args, kwargs)
    if not cache.narrowed:
        raise RuntimeError(f"the last block, a {type(block).__name__}, keeps no keys and values")
    return tuple(_narrow(value, cache) for value in args), {
        name: _narrow(value, cache) for name, value in kwargs.items()
    }


def _after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Pad the block's output to [B, T, H], as the rest of the model expects it."""
    cache = _here.cache
    if cache is None or not cache.narrowed:
        return None
    cache.ended()
    before = cache.width - cache.keep
    if isinstance(output, tuple):
        return (pad(output[0], (0, 0, before, 0)), *output[1:])
    return pad(output, (0, 0, before, 0))


def _width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden.shape[1]


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _narrow(value: Any, cache: LastColumns) -> Any:
    """Narrow an argument of the block to the wanted columns.

    Columns are dimension 2 of masks, and dimension 1 of hidden states, positions and tensors
    computed from positions.
    """
    if isinstance(value, tuple):
        return tuple(_narrow(part, cache) for part in value)
    if not isinstance(value, Tensor):
        return value
    column_dim = 2 if _is_mask(value) else 1
    if value.dim() <= column_dim or value.shape[column_dim] != cache.width:
        return value
    return value.narrow(column_dim, cache.width - cache.keep, cache.keep)
