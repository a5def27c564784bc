"""What a prompt method yields, and K of them made ready for a forward.

Shapes: K prompts, P virtual tokens, H width, L layers, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

SITES = ("decoder", "encoder", "cross")
"""Where a prefix may stand: self-attention of the decoder (or of the only stack), of the encoder, cross-attention."""


@dataclass(frozen=True)
class PromptTensors:
    """One prompt, whatever method learned it: embeddings, or keys and values of each layer.

    ``embeddings`` [P, H] are virtual tokens as they enter the model, in front of the row or, with ``inside``, where the
    row's template places them. ``prefixes`` has for each site [L, 2, kv heads, P, head width]: keys and values that
    every token of the site attends to (Li & Liang 2021, section 4).
    """

    embeddings: Tensor | None = None
    prefixes: Mapping[str, Tensor] = field(default_factory=dict)
    inside: bool = False

    @classmethod
    def of(cls, prompt: Tensor | PromptTensors) -> PromptTensors:
        """A bare tensor [P, H] is a soft prompt."""
        return cls(prompt) if isinstance(prompt, Tensor) else prompt

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that an artifact stores them under."""
        soft = {} if self.embeddings is None else {"prompt": self.embeddings}
        return {**soft, **{f"prefix.{site}": tensor for site, tensor in self.prefixes.items()}}

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor], inside: bool = False) -> PromptTensors:
        """The reverse of ``named``; other names are ignored."""
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
    """One kind of thing of K prompts: ``tensors``, each [K, ..., P, width], padded on the right; ``lengths`` [K]."""

    tensors: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def width(self) -> int:
        """The padded length P."""
        return int(self.tensors[0].shape[-2])

    def mask(self, rows: Tensor) -> Tensor:
        """[B, P] true where row b's prompt has a virtual token; ``rows`` [B] are places among the K."""
        return torch.arange(self.width, device=rows.device)[None, :] < self.lengths[rows][:, None]

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        """Each tensor as [B, ..., P, width], every row with its own prompt's."""
        if self.tensors[0].shape[0] == 1:
            return [tensor.expand(len(rows), *tensor.shape[1:]) for tensor in self.tensors]
        return [tensor.index_select(0, rows) for tensor in self.tensors]


@dataclass(frozen=True)
class PreparedPrompts:
    """K prompts, ready to stand in front of rows.

    ``parts``: ``cache`` keys and values that rows continue from (key and value of each layer, [K, kv heads, P, head
    width]), ``front`` embeddings in front of rows, ``inner`` embeddings that rows place themselves, and a part for each
    attention site of a prefix. A prompt that has nothing of a part has length 0 in it.
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
        """Columns that a row's prompt takes at most."""
        return max((part.width for part in self.parts.values()), default=0)

    @property
    def kinds(self) -> frozenset[str]:
        """Prompts of equal kinds can share a forward on every family."""
        return frozenset(self.parts)

    def select(self, places: Sequence[int]) -> PreparedPrompts:
        """Some of the prompts, in the given order."""

        def picked(part: Part) -> Part:
            index = torch.tensor(list(places), device=part.lengths.device)
            return Part(tuple(tensor[index] for tensor in part.tensors), part.lengths[index])

        return replace(
            self, parts={name: picked(part) for name, part in self.parts.items()}, count=len(places)
        )

    def leaf(self) -> PreparedPrompts:
        """The same values cut off from their graph, ready to collect gradients over several micro-batches."""
        return replace(self, parts={name: _map(part, _leaf) for name, part in self.parts.items()})

    def backward_from(self, leaf: PreparedPrompts, first: int = 0) -> None:
        """Send the gradients collected by ``leaf`` on to the prompts, which are those of its places from ``first``."""
        tensors, gradients = [], []
        for name, part in self.parts.items():
            for tensor, other in zip(part.tensors, leaf.parts[name].tensors, strict=True):
                if tensor.requires_grad and other.grad is not None:
                    tensors.append(tensor)
                    gradients.append(
                        other.grad[first : first + self.count].narrow(-2, 0, part.width)
                    )
        if tensors:
            torch.autograd.backward(tensors, gradients)

    def to(self, device: torch.device) -> PreparedPrompts:
        """The same values in a device's memory."""

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
    """One part from each prompt's own tensors [..., P_k, width]; None is a prompt that has nothing of it.

    ``like`` gives device and dtype.
    """
    present = next(member for member in members if member is not None)
    lengths = [0 if member is None else int(member[0].shape[-2]) for member in members]
    width = max(lengths)
    stacked = []
    for place, shape_of in enumerate(present):
        empty = like.new_zeros(*shape_of.shape[:-2], width, shape_of.shape[-1])
        each = [
            empty if member is None else _padded(member[place].to(like), width)
            for member in members
        ]
        stacked.append(torch.stack(each))
    return Part(tuple(stacked), torch.tensor(lengths, device=like.device))


def _padded(tensor: Tensor, width: int) -> Tensor:
    return pad(tensor, (0, 0, 0, width - tensor.shape[-2]))


def stack_prepared(prepared: Sequence[PreparedPrompts]) -> PreparedPrompts:
    """Prompts that were prepared one by one, as one value in the same order."""
    if len(prepared) == 1:
        return prepared[0]
    names = dict.fromkeys(name for one in prepared for name in one.parts)
    return PreparedPrompts(
        {name: _stack_part([one.parts.get(name) for one in prepared], prepared) for name in names},
        sum(one.count for one in prepared),
    )


def _stack_part(parts: Sequence[Part | None], prepared: Sequence[PreparedPrompts]) -> Part:
    present = next(part for part in parts if part is not None)
    width = max(part.width for part in parts if part is not None)
    columns = []
    for place, like in enumerate(present.tensors):
        each = []
        for part, one in zip(parts, prepared, strict=True):
            empty = like.new_zeros(one.count, *like.shape[1:-2], width, like.shape[-1])
            each.append(empty if part is None else _padded(part.tensors[place], width))
        columns.append(torch.cat(each))
    zeros = [present.lengths.new_zeros(one.count) for one in prepared]
    lengths = [
        none if part is None else part.lengths for part, none in zip(parts, zeros, strict=True)
    ]
    return Part(tuple(columns), torch.cat(lengths))
