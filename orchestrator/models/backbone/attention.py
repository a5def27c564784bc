"""What is done inside a model's attention.

transformers lets a model's attention be any registered function of (module, query, key, value, mask). Ours are two, and
hand on to the library's own. One puts the rows' prefix in front of key and value where one is set for the module: for
models whose attention keeps no cache to put it in, which are encoders, and cross-attention. The other spares a CPU the
copies of keys and values that the heads of a group share.

Shapes: B rows, P virtual tokens, Q queries, T keys, L layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

PREFIXED = "orchestrator_prefix"
GROUPED = "orchestrator_grouped"


@dataclass(frozen=True)
class RowPrefix:
    """One module's prefix for the rows of a forward: ``key`` and ``value`` [B, kv heads, P, width], ``mask`` [B, P]."""

    key: Tensor
    value: Tensor
    mask: Tensor


class _Thread(threading.local):
    """What a thread has set: a server reads a new prompt's shapes off the model while it answers with others."""

    def __init__(self) -> None:
        self.active: dict[nn.Module, RowPrefix] = {}
        self.recorders: list[dict[nn.Module, tuple[Tensor, Tensor]]] = []


_here = _Thread()


@contextmanager
def prefixed(prefixes: Mapping[nn.Module, RowPrefix]) -> Iterator[None]:
    """Within, the attention modules named see their prefix in front of their keys, in this thread's forwards."""
    before = _here.active
    _here.active = {**before, **prefixes}
    try:
        yield
    finally:
        _here.active = before


@contextmanager
def recorded() -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Within, keys and values of every attention module that this thread runs are kept, in the order of the calls."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    _here.recorders.append(seen)
    try:
        yield seen
    finally:
        _here.recorders.pop()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The library's scaled dot product attention, behind the module's prefix if it has one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for seen in _here.recorders:
        seen[module] = (key, value)
    prefix = _here.active.get(module)
    if prefix is not None:
        attention_mask = _extended(
            module, query, key, attention_mask, prefix, options.get("is_causal")
        )
        key = torch.cat([prefix.key.to(key), key], dim=2)
        value = torch.cat([prefix.value.to(value), value], dim=2)
        options["is_causal"] = False  # the mask says it all
        if (bias := options.get("position_bias")) is not None:
            # A relative position has no meaning for a prefix: its keys stand at no place.
            options["position_bias"] = pad(bias, (prefix.mask.shape[1], 0))
    out: tuple[Tensor, Any] = sdpa_attention_forward(
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
    """The mask [B, 1, Q, P + T] with the prefix's columns in front."""
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
) -> tuple[Tensor, Any]:
    """The library's attention, bit for bit, with each group's keys and values read where they are.

    The library copies them for every head. Torch's function for CPUs need not, and is faster unless each row has a
    single query (docs/decisions.md).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shares = query.device.type == "cpu" and query.shape[1] > key.shape[1] and query.shape[2] > 1
    if (
        not shares
        or attention_mask is None
        or options.keys() & {"softcap", "position_bias", "cache"}
    ):
        out: tuple[Tensor, Any] = sdpa_attention_forward(
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


def install_prefixes(model: nn.Module) -> None:
    """Let the model's attention have prefixes. The results without one stay the library's."""
    _install(model, PREFIXED, attention)


def install_grouped(model: Any) -> None:
    """Spare a model whose heads share keys and values the copies of them, where transformers lets us."""
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    if (
        getattr(config, "num_key_value_heads", None) not in (None, heads)
        and model._supports_attention_backend
    ):
        _install(model, GROUPED, grouped_attention)


def _install(model: Any, name: str, function: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def called_modules(seen: Mapping[nn.Module, Any], within: nn.Module) -> list[nn.Module]:
    """The recorded attention modules that are part of ``within``, in the order of their calls."""
    inside = set(within.modules())
    return [module for module in seen if module in inside]


def layer_prefixes(
    modules: Sequence[nn.Module], tensors: Sequence[Tensor], mask: Tensor
) -> dict[nn.Module, RowPrefix]:
    """A site's rows' prefixes for its modules: ``tensors`` are key and value of each layer."""
    pairs = zip(modules, tensors[::2], tensors[1::2], strict=True)
    return {module: RowPrefix(key, value, mask) for module, key, value in pairs}
