"""The last block at the columns that are read, and nowhere else.

What a causal model's last block gives at a column matters only where logits are asked for. Of all other columns it
needs keys and values alone. So it runs twice: on all columns, until its attention has handed keys and values to the
cache, and then on the columns wanted, whose attention finds there what the first run left. The numbers are the same;
queries, the attention's output and the feed-forward part of the block are computed for a few columns instead of all.

Shapes: B rows, T columns of a forward, S columns behind them and their own, H width.
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
    """A cache for one forward whose last block is to give the ``keep`` last columns only. Afterwards, and where the
    block can't be asked for less, it is like any other."""

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
        if self._kept is not None:  # those of the wanted columns are among them already
            return self._kept
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if self._keeping:
            self._kept = both
            raise _Kept
        return both

    @property
    def narrowed(self) -> bool:
        """Whether the last block is running for the wanted columns."""
        return self._kept is not None

    def keep_keys(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the block as far as its keys and values."""
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
    """The block's keys and values are in the cache: nobody reads the rest of this run."""


class _Thread(threading.local):
    """The forward that a thread is in: several share one model."""

    cache: LastColumns | None = None


_here = _Thread()


def watch(model: nn.Module) -> None:
    """Let the model's forwards ask its last block for less. Without ``reading`` they stay as they are. A model that is
    watched already stays so."""
    last = blocks_of(model)[-1]
    if _before not in last._forward_pre_hooks.values():
        last.register_forward_pre_hook(_before, with_kwargs=True)
        last.register_forward_hook(_after)


@contextmanager
def reading(cache: Cache, keep: int) -> Iterator[Cache]:
    """Within, the model's last block gives the ``keep`` last columns of this thread's forward, and zeros before them.
    The forward takes the cache that this yields, and masks as [B, 1, T, S] or [B, S]."""
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
        return None  # nothing to save; or attention takes queries and keys to be the same columns
    cache.keep_keys(block, args, kwargs)
    if not cache.narrowed:
        raise RuntimeError(f"the last block, a {type(block).__name__}, keeps no keys and values")
    return tuple(_narrow(value, cache) for value in args), {
        name: _narrow(it, cache) for name, it in kwargs.items()
    }


def _after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The block's output [B, T, H], as what follows expects it."""
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
    """What the block is given, at the columns wanted: hidden states, positions and what is made of them have the
    columns in their second place, masks in their third."""
    if isinstance(value, tuple):
        return tuple(_narrow(part, cache) for part in value)
    if not isinstance(value, Tensor):
        return value
    place = 2 if _is_mask(value) else 1
    if value.dim() <= place or value.shape[place] != cache.width:
        return value
    return value.narrow(place, cache.width - cache.keep, cache.keep)
