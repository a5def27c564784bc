"""The frozen backbone, whatever its family: what the rest of the product may ask of it.

Shapes: B rows, P virtual tokens, T input tokens, Y target tokens, H width, L layers, K prompts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.models.backbone.prepared_prompts import (
    Part,
    PreparedPrompts,
    PromptTensors,
    pad_part,
)
from orchestrator.models.backbone.sharding import gather_once, local, reset_blocks, shard_blocks
from orchestrator.models.source import BaseModelInfo, Family

Ids = Sequence[int]


class RowState(Protocol):
    """Rows that can go on: ``logits`` [B, V] of the next token."""

    logits: Tensor

    def select(self, rows: Tensor) -> Self:
        """The state of the given rows, in that order, with repetition."""
        ...


class Backbone(ABC):
    """A frozen language model with its tokenizer."""

    family: ClassVar[Family]

    def __init__(self, model: nn.Module, tokenizer: Any, info: BaseModelInfo) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info
        self.sharded = False

    def shard(self, device: torch.device, before_gather: Callable[[], Any]) -> None:
        """Keep only this worker's part of the blocks, on ``device``; see ``sharding.shard_blocks``. ``gather_once``
        comes before the first forward."""
        shard_blocks(self.model, device, before_gather)
        self.sharded = True

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def table(self) -> Tensor:
        """The input embedding table, [V, H]."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the model for token ids: rows of the table, scaled where the family does so (Gemma)."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        return embeddings

    @abstractmethod
    def prepare(self, prompts: Sequence[Tensor | PromptTensors]) -> PreparedPrompts:
        """K prompts to what stands in front of rows; differentiable. float32 prompts are cast here.

        A bare tensor [P_k, H] is a soft prompt. BadInput for a prompt that the family can't take.
        """

    def shares_forward(self, kinds: frozenset[str]) -> bool:
        """Whether one forward takes prompts that have these ``PreparedPrompts.kinds`` between them."""
        return True

    @abstractmethod
    def teacher_forced(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, Y, V] that predict the targets, and the targets [B, Y], -100 where a row has none.

        ``prompt[b]`` is the place of row b's prompt among the K; ``prompts=None`` is the model as it stands.
        """

    @property
    @abstractmethod
    def continues(self) -> bool:
        """Whether rows can be started and extended token by token at the cost of the new tokens alone."""

    def start(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> Any:
        """Run the inputs: a ``RowState`` whose logits [B, V] are those of the first target token."""
        raise NotImplementedError(f"a {self.family} backbone can't continue rows")

    def extend(self, state: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Feed further tokens [B, n], padded on the right, after rows already run: logits [B, n, V] and the new state.

        The state's cache grows in place: a state is used once. ``logits`` of the new state are those of column n - 1.
        """
        raise NotImplementedError(f"a {self.family} backbone can't continue rows")

    @abstractmethod
    def activations(self, embeddings: Tensor) -> dict[str, Tensor]:
        """For each site [L, 2, kv heads, P, head width]: keys and values that a soft prompt [P, H] has in this model.

        As a prefix they are where prefix tuning starts from real words (Li & Liang 2021, section 7.4). BadInput for a
        model without such keys and values.
        """

    @cached_property
    def prefix_shapes(self) -> dict[str, torch.Size]:
        """For each site the shape that a prefix of one token has. BadInput for a model that takes none."""
        with torch.inference_mode():
            one = self.embed(torch.zeros(1, dtype=torch.long, device=self.device))
            return {site: tensor.shape for site, tensor in self.activations(one).items()}

    def inner_counts(self, prompts: PreparedPrompts | None, prompt: Sequence[int]) -> list[int]:
        """How many virtual tokens each row places itself."""
        if prompts is None or "inner" not in prompts.parts:
            return [0] * len(prompt)
        lengths = prompts.parts["inner"].lengths.tolist()
        return [int(lengths[place]) for place in prompt]

    def row_embeddings(
        self, prompts: PreparedPrompts | None, ids: Tensor, prompt: Tensor
    ) -> Tensor:
        """[B, T, H]: each token's embedding; a negative id -(k + 1) is virtual token k of the row's prompt."""
        embeddings = self.embed(ids.clamp(min=0))
        if prompts is None or "inner" not in prompts.parts:
            return embeddings
        (virtual,) = prompts.parts["inner"].of_rows(prompt)
        place = (-ids - 1).clamp(min=0, max=virtual.shape[1] - 1)
        taken = virtual.gather(1, place[:, :, None].expand(-1, -1, virtual.shape[2]))
        return torch.where((ids < 0)[:, :, None], taken, embeddings)

    def _embedding_part(self, prompts: Sequence[PromptTensors], inside: bool) -> dict[str, Part]:
        """The embeddings that stand in front of rows, or inside them; nothing when no prompt has any."""
        chosen = [
            (prompt.embeddings,)
            if prompt.embeddings is not None and prompt.inside == inside
            else None
            for prompt in prompts
        ]
        return (
            {("inner" if inside else "front"): pad_part(chosen, self.table)} if any(chosen) else {}
        )

    def check_prefix(self, prefixes: Mapping[str, Tensor]) -> None:
        """BadInput unless a prefix has this model's sites, layers, heads and head width."""
        wanted = self.prefix_shapes if prefixes else {}
        for site, tensor in prefixes.items():
            if site not in wanted:
                raise BadInput(
                    f"a prefix for {site} attention does not fit a {self.family} model: {sorted(wanted)}"
                )
            expected, got = list(wanted[site]), list(tensor.shape)
            if got[:3] != expected[:3] or got[4] != expected[4]:
                raise BadInput(
                    f"a prefix of [layers, 2, kv heads, tokens, head width] = {got} does not fit this model, "
                    f"which takes {[*expected[:3], got[3], expected[4]]} in {site} attention"
                )

    def gather_once(self) -> None:
        """With the other workers, find out that all parts of a sharded model are there."""
        if self.sharded:
            gather_once(self.model)

    def give_up_forward(self) -> None:
        """After a forward or backward that broke off: nothing of it is left in the model."""
        if self.sharded:
            reset_blocks(self.model)

    def digest(self) -> str:
        """sha256 over the weights in memory, where they are sharded those of this worker: the same before and after a
        search."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(
                local(tensor)
                .detach()
                .cpu()
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
        return digest.hexdigest()


def no_prefix(model_type: str, reason: str) -> BadInput:
    """A model that has no place for a prefix."""
    return BadInput(
        f"a {model_type} model can't take a prefix: {reason}",
        "use method prompt_tuning or p_tuning",
    )
