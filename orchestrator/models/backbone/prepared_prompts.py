"""The tensors that a prompt method yields, and K prompts prepared for a forward.

Shapes: K prompts, P virtual tokens, H width, L layers, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

SITES = ("decoder", "encoder", "cross")
"""Attention sites of a prefix: self-attention of the decoder (or of a model's only stack),
self-attention of the encoder, and cross-attention."""


@dataclass(frozen=True)
class PromptTensors:
    """A prompt, whatever method learned it: embeddings, or keys and values of each layer.

    ``embeddings`` [P, H] are virtual tokens as they enter the model. They stand in front of the row
    or, with ``inside``, where the row's template places them. ``prefixes`` holds [L, 2, kv heads,
    P, head width] for each site: keys and values that every token of the site attends to (Li &
    Liang 2021, section 4).
    """

    embeddings: Tensor | None = None
    prefixes: Mapping[str, Tensor] = field(default_factory=dict)
    inside: bool = False

    @classmethod
    def of(cls, prompt: Tensor | PromptTensors) -> PromptTensors:
        """Take a bare tensor [P, H] as a soft prompt, and return anything else unchanged."""
        return cls(prompt) if isinstance(prompt, Tensor) else prompt

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names under which an artifact stores them."""
        soft = {} if self.embeddings is None else {"prompt": self.embeddings}
        return {**soft, **{f"prefix.{site}": tensor for site, tensor in self.prefixes.items()}}

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor], inside: bool = False) -> PromptTensors:
        """Build a prompt from tensors named as by ``named``; other names are ignored."""
        prefixes = {
            site: tensors[f"prefix.{site}"] for site in SITES if f"prefix.{site}" in tensors
        }
        return cls(tensors.get("prompt"), prefixes, inside)

    @property
    def num_virtual_tokens(self) -> int:
        if self.embeddings is not None:
            return len(self.embeddings)
        return int(next(iter(self.prefixes.values())).shape[-2]) if self.prefixes else 0


@dataclass(frozen=True)
class Part:
    """A kind of tensors of K prompts, such as keys and values.

    ``tensors`` are each [K, ..., P, width], padded on the right. ``lengths`` [K] are the prompts'
    lengths without padding.
    """

    tensors: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def width(self) -> int:
        """The padded length P."""
        return int(self.tensors[0].shape[-2])

    def mask(self, rows: Tensor) -> Tensor:
        """Return [B, P], true where row b's prompt has a virtual token.

        ``rows`` [B] are indices among the K prompts.
        """
        return torch.arange(self.width, device=rows.device)[None, :] < self.lengths[rows][:, None]

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        """Return each tensor as [B, ..., P, width], with every row's own prompt."""
        if self.tensors[0].shape[0] == 1:
            return [tensor.expand(len(rows), *tensor.shape[1:]) for tensor in self.tensors]
        return [tensor.index_select(0, rows) for tensor in self.tensors]


@dataclass(frozen=True)
class PreparedPrompts:
    """K prompts, prepared for a forward with rows.

    ``parts`` may have ``cache``, keys and values that rows continue from (key and value of each
    layer, [K, kv heads, P, head width]); ``front``, embeddings in front of rows; ``inner``,
    embeddings that rows place themselves; and a part for each attention site of a prefix. A prompt
    without tensors of a part has length 0 in that part.
    """

    parts: Mapping[str, Part]
    count: int

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts.values() for tensor in part.tensors]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def width(self) -> int:
        """The largest number of columns that a row's prompt takes."""
        return max((part.width for part in self.parts.values()), default=0)

    @property
    def kinds(self) -> frozenset[str]:
        """The names of the parts; prompts of equal kinds can share a forward in every family."""
        return frozenset(self.parts)

    def select(self, places: Sequence[int]) -> PreparedPrompts:
        """Select the prompts at the given indices, in that order."""

        def picked(part: Part) -> Part:
            index = torch.tensor(list(places), device=part.lengths.device)
            return Part(tuple(tensor[index] for tensor in part.tensors), part.lengths[index])

        return replace(
            self, parts={name: picked(part) for name, part in self.parts.items()}, count=len(places)
        )

    def leaf(self) -> PreparedPrompts:
        """Copy the prompts as leaf tensors, which collect gradients over several micro-batches.

        The values are the same and are detached from their graph.
        """
        return replace(self, parts={name: _map(part, _leaf) for name, part in self.parts.items()})

    def backward_from(self, leaf: PreparedPrompts, first: int = 0) -> None:
        """Backpropagate the gradients that ``leaf`` has collected into these prompts.

        These prompts are those of ``leaf`` from index ``first`` on.
        """
        tensors, gradients = [], []
        for name, part in self.parts.items():
            for tensor, leaf_tensor in zip(part.tensors, leaf.parts[name].tensors, strict=True):
                if tensor.requires_grad and leaf_tensor.grad is not None:
                    tensors.append(tensor)
                    gradients.append(
                        leaf_tensor.grad[first : first + self.count].narrow(-2, 0, part.width)
                    )
        if tensors:
            torch.autograd.backward(tensors, gradients)

    def to(self, device: torch.device) -> PreparedPrompts:
        """Copy the prompts to the memory of a device."""

        def moved(part: Part) -> Part:
            return Part(
                tuple(tensor.to(device) for tensor in part.tensors), part.lengths.to(device)
            )

        return replace(self, parts={name: moved(part) for name, part in self.parts.items()})

    def detach(self) -> PreparedPrompts:
        return replace(
            self, parts={name: _map(part, Tensor.detach) for name, part in self.parts.items()}
        )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _map(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    return Part(tuple(change(tensor) for tensor in part.tensors), part.lengths)


def pad_part(members: Sequence[tuple[Tensor, ...] | None], like: Tensor) -> Part:
    """Pad each prompt's own tensors [..., P_k, width] to one length and stack them as a part.

    A member that is None is a prompt without such tensors. ``like`` gives device and dtype.
    """
    present = next(member for member in members if member is not None)
    lengths = [0 if member is None else int(member[0].shape[-2]) for member in members]
    width = max(lengths)
    stacked = []
    for tensor_index, shape_of in enumerate(present):
        no_prompt = like.new_zeros(*shape_of.shape[:-2], width, shape_of.shape[-1])
        padded = [
            no_prompt if member is None else _padded(member[tensor_index].to(like), width)
            for member in members
        ]
        stacked.append(torch.stack(padded))
    return Part(tuple(stacked), torch.tensor(lengths, device=like.device))


def _padded(tensor: Tensor, width: int) -> Tensor:
    return pad(tensor, (0, 0, 0, width - tensor.shape[-2]))


def stack_prepared(prepared: Sequence[PreparedPrompts]) -> PreparedPrompts:
    """Combine prompts that were prepared one by one, in the same order."""
    if len(prepared) == 1:
        return prepared[0]
    names = dict.fromkeys(name for prompts in prepared for name in prompts.parts)
    return PreparedPrompts(
        {
            name: _stack_part([prompts.parts.get(name) for prompts in prepared], prepared)
            for name in names
        },
        sum(prompts.count for prompts in prepared),
    )


def _stack_part(parts: Sequence[Part | None], prepared: Sequence[PreparedPrompts]) -> Part:
    present = next(part for part in parts if part is not None)
    width = max(part.width for part in parts if part is not None)
    columns = []
    for tensor_index, like in enumerate(present.tensors):
        padded = []
        for part, prompts in zip(parts, prepared, strict=True):
            empty = like.new_zeros(prompts.count, *like.shape[1:-2], width, like.shape[-1])
            padded.append(empty if part is None else _padded(part.tensors[tensor_index], width))
        columns.append(torch.cat(padded))
    zeros = [present.lengths.new_zeros(prompts.count) for prompts in prepared]
    lengths = [
        none if part is None else part.lengths for part, none in zip(parts, zeros, strict=True)
    ]
    return Part(tuple(columns), torch.cat(lengths))
