"""Rotary position encodings whose factors depend on a row's length.

LongRoPE (Ding et al. 2024; Phi-3, Phi-3.5, Phi-4-mini) has one set of factors for rows up to a
certain length, here called the switch, and another set for longer rows. Dynamic NTK scaling changes
its factors beyond ``max_position_embeddings``. That is the context length, which no row exceeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LONGROPE = ("longrope", "su")  # the first Phi-3 models use the second name


def rope_switches(config: PreTrainedConfig, context_length: int) -> tuple[int, ...]:
    """Return the row lengths below the context length at which position factors change.

    The result is empty for a model that treats all rows alike.
    """
    document = config.to_dict()
    original_length = document.get("original_max_position_embeddings")
    switches = {
        parameters.get("original_max_position_embeddings") or original_length or 0
        for parameters in _longrope_parameters(document)
    }
    return tuple(sorted(switch for switch in switches if switch < context_length))


def _longrope_parameters(document: Any) -> Iterator[dict[str, Any]]:
    """Find the LongRoPE parameters at any depth; some models have a set for each type of layer."""
    if not isinstance(document, dict):
        return
    if document.get("rope_type", document.get("type")) in LONGROPE:
        yield document
    for value in document.values():
        yield from _longrope_parameters(value)
