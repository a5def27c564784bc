"""Attention functions that are installed in a model.

transformers lets a model's attention be any registered function of (module, query, key, value,
mask). The two functions here wrap the library's own. One puts the rows' prefix in front of key and
value, in modules for which a prefix is set. It serves attention that keeps no cache to put a prefix
in: encoders and cross-attention. The other avoids, on a CPU, the copies of keys and values that the
heads of a group share.

Shapes: B rows, P virtual tokens, Q queries, T keys, L layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIXED = "orchestrator_prefix"
GROUPED = "orchestrator_grouped"


@dataclass(frozen=True)
class RowPrefix:
    """An attention module's prefix for the rows of a forward.

    ``key`` and ``value`` are [B, kv heads, P, width], ``mask`` is [B, P].
    """

    key: Tensor
    value: Tensor
    mask: Tensor


class _ThreadPrefixes(threading.local):
    """The prefixes and recorders of one thread.

    They are per thread because a server records a new prompt's shapes from the model while other
    threads answer with other prompts.
    """

    def __init__(self) -> None:
        self.active: dict[nn.Module, RowPrefix] = {}
        self.recorders: list[dict[nn.Module, tuple[Tensor, Tensor]]] = []


_here = _ThreadPrefixes()


@contextmanager
def prefixed(prefixes: Mapping[nn.Module, RowPrefix]) -> Iterator[None]:
    """Put prefixes in front of the keys of the given modules, in this thread's forwards."""
    before = _here.active
    _here.active = {**before, **prefixes}
    try:
        yield
    finally:
        _here.active = before


@contextmanager
def recorded() -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record keys and values of every attention module that this thread runs, in call order."""
    records: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    _here.recorders.append(records)
    try:
        yield records
    finally:
        _here.recorders.pop()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the library's scaled dot product attention, after the module's prefix if one is set."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for records in _here.recorders:
        records[module] = (key, value)
    prefix = _here.active.get(module)
    if prefix is not None:
        attention_mask = _extended(
            module, query, key, attention_mask, prefix, options.get("is_causal")
        )
        key = torch.cat([prefix.key.to(key), key], dim=2)
        value = torch.cat([prefix.value.to(value), value], dim=2)
        options["is_causal"] = False  # the mask already includes causality
        if (bias := options.get("position_bias")) is not None:
            # A prefix's keys have no position, so their relative position bias is zero.
            options["position_bias"] = pad(bias, (prefix.mask.shape[1], 0))
    out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return out


def _extended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    prefix: RowPrefix,
    is_causal: bool | None,
) -> Tensor:
    """Return the mask [B, 1, Q, P + T] with the prefix's columns in front."""
    rows, queries, keys = len(query), query.shape[2], key.shape[2]
    if mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries) if causal and queries > 1 else mask
        mask = mask[None, None]
    mask = mask.expand(rows, -1, queries, -1)
    front = prefix.mask[:, None, None, :].expand(rows, mask.shape[1], queries, -1)
    if mask.dtype != torch.bool:
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(
            ~front, torch.finfo(mask.dtype).min
        )
    return torch.cat([front, mask], dim=-1)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the library's attention without copying the keys and values of each group.

    The library copies them for every head. Torch's function for CPUs doesn't need the copies, gives
    the same result bit for bit, and is faster unless each row has a single query
    (docs/decisions/0014-last-block.md).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shares = query.device.type == "cpu" and query.shape[1] > key.shape[1] and query.shape[2] > 1
    if (
        not shares
        or attention_mask is None
        or options.keys() & {"softcap", "position_bias", "cache"}
    ):
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return out
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None


def install_prefixes(model: PreTrainedModel) -> None:
    """Let the model's attention take prefixes; results without a prefix don't change."""
    _install(model, PREFIXED, attention)


def install_grouped(model: PreTrainedModel) -> None:
    """Avoid the copies of keys and values that heads share, where transformers allows it."""
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    if (
        getattr(config, "num_key_value_heads", None) not in (None, heads)
        and model._supports_attention_backend
    ):
        _install(model, GROUPED, grouped_attention)


def _install(model: PreTrainedModel, name: str, function: Callable[..., object]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def called_modules(records: Mapping[nn.Module, object], within: nn.Module) -> list[nn.Module]:
    """Return the recorded attention modules inside ``within``, in the order of their calls."""
    inside = set(within.modules())
    return [module for module in records if module in inside]


def layer_prefixes(
    modules: Sequence[nn.Module], tensors: Sequence[Tensor], mask: Tensor
) -> dict[nn.Module, RowPrefix]:
    """Assign a site's prefixes of the rows to the site's modules.

    ``tensors`` are key and value of each layer.
    """
    pairs = zip(modules, tensors[::2], tensors[1::2], strict=True)
    return {module: RowPrefix(key, value, mask) for module, key, value in pairs}
