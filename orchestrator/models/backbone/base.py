"""The interface of a frozen backbone that all model families share.

Shapes: B rows, P virtual tokens, T input tokens, Y target tokens, H width, L layers, K prompts, V
vocabulary.
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
from orchestrator.models.tokenizer import Tokenizer

Ids = Sequence[int]


class RowState(Protocol):
    """State of rows that can be extended by further tokens.

    ``logits`` [B, V] predict the next token of each row.
    """

    logits: Tensor

    def select(self, rows: Tensor) -> Self:
        """Return the state of the given rows, in that order; a row may appear several times."""
        ...


class Backbone(ABC):
    """A frozen language model with its tokenizer."""

    family: ClassVar[Family]
    answers_as_tree: bool = True
    """False scores answers one by one instead of as a tree of their tokens; the results agree."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, info: BaseModelInfo) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info
        self.sharded = False

    def shard(self, device: torch.device, before_gather: Callable[[], object]) -> None:
        """Keep only this worker's part of each block's weights, on ``device``.

        See ``sharding.shard_blocks``. Call ``gather_once`` before the first forward.
        """
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
        """Return the embeddings that enter the model for token ids.

        They are rows of the table, scaled in families that scale them (Gemma).
        """
        embeddings: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        return embeddings

    @abstractmethod
    def prepare(self, prompts: Sequence[Tensor | PromptTensors]) -> PreparedPrompts:
        """Prepare K prompts for a forward, so that gradients flow back to them.

        A bare tensor [P_k, H] is a soft prompt. float32 prompts are cast to the model's dtype here.
        Raises BadInput for a prompt that the model family can't take.
        """

    def shares_forward(self, kinds: frozenset[str]) -> bool:
        """Return whether prompts with these ``PreparedPrompts.kinds`` can run in one forward."""
        return True

    @abstractmethod
    def teacher_forced(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [B, Y, V] that predict the targets, and the padded targets [B, Y].

        Targets shorter than Y are padded with -100. ``prompt[b]`` is the index of row b's prompt
        among the K prompts. ``prompts=None`` runs the model without a prompt.
        """

    @property
    @abstractmethod
    def continues(self) -> bool:
        """True if rows can be started once and then extended at the cost of only the new tokens."""

    @property
    def branches(self) -> bool:
        """True if one forward can run continuations of a row that do not see each other."""
        return False

    def start(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> RowState:
        """Run the inputs; return their state with logits [B, V] of the first target token."""
        raise NotImplementedError(f"a {self.family} backbone can't continue rows")

    def extend(self, state: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, RowState]:
        """Run further tokens [B, n] of started rows; return logits [B, n, V] and the new state.

        ``state`` comes from ``start`` or ``extend`` of this backbone. The tokens are padded on the
        right. The state's cache grows in place, so a state can be extended only once. The new
        state's ``logits`` are those of column n - 1.
        """
        raise NotImplementedError(f"a {self.family} backbone can't continue rows")

    @abstractmethod
    def activations(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the keys and values that a soft prompt [P, H] has in this model.

        They have the shape [L, 2, kv heads, P, head width] for each attention site. Prefix tuning
        starts from the activations of real words (Li & Liang 2021, section 7.4). Raises BadInput
        for a model without such keys and values.
        """

    @cached_property
    def prefix_shapes(self) -> dict[str, torch.Size]:
        """The shape of a prefix of one token, for each attention site.

        Raises BadInput for a model that can't take a prefix.
        """
        with torch.inference_mode():
            embedding = self.embed(torch.zeros(1, dtype=torch.long, device=self.device))
            return {site: tensor.shape for site, tensor in self.activations(embedding).items()}

    def inner_counts(self, prompts: PreparedPrompts | None, prompt: Sequence[int]) -> list[int]:
        """Count the virtual tokens that each row's template places inside the row."""
        if prompts is None or "inner" not in prompts.parts:
            return [0] * len(prompt)
        lengths = prompts.parts["inner"].lengths.tolist()
        return [int(lengths[prompt_index]) for prompt_index in prompt]

    def row_embeddings(
        self, prompts: PreparedPrompts | None, ids: Tensor, prompt: Tensor
    ) -> Tensor:
        """Return the embedding of each token, [B, T, H].

        A negative id -(k + 1) stands for virtual token k of the row's prompt.
        """
        embeddings = self.embed(ids.clamp(min=0))
        if prompts is None or "inner" not in prompts.parts:
            return embeddings
        (virtual,) = prompts.parts["inner"].of_rows(prompt)
        virtual_index = (-ids - 1).clamp(min=0, max=virtual.shape[1] - 1)
        virtual_embeddings = virtual.gather(
            1, virtual_index[:, :, None].expand(-1, -1, virtual.shape[2])
        )
        return torch.where((ids < 0)[:, :, None], virtual_embeddings, embeddings)

    def _embedding_part(self, prompts: Sequence[PromptTensors], inside: bool) -> dict[str, Part]:
        """Return the part of the embeddings in front of rows, or of those inside rows.

        The result is empty when no prompt has such embeddings.
        """
        members = [
            (prompt.embeddings,)
            if prompt.embeddings is not None and prompt.inside == inside
            else None
            for prompt in prompts
        ]
        if not any(members):
            return {}
        name = "inner" if inside else "front"
        return {name: pad_part(members, self.table)}

    def check_prefix(self, prefixes: Mapping[str, Tensor]) -> None:
        """Raise BadInput unless a prefix has this model's sites, layers, heads and head width."""
        expected_shapes = self.prefix_shapes if prefixes else {}
        for site, tensor in prefixes.items():
            if site not in expected_shapes:
                raise BadInput(
                    f"a prefix for {site} attention does not fit a {self.family} model: "
                    f"{sorted(expected_shapes)}"
                )
            expected, actual = list(expected_shapes[site]), list(tensor.shape)
            fitting = [*expected[:3], actual[3], expected[4]]
            if actual[:3] != expected[:3] or actual[4] != expected[4]:
                raise BadInput(
                    f"a prefix of [layers, 2, kv heads, tokens, head width] = {actual} does not "
                    f"fit this model, which takes {fitting} in {site} attention"
                )

    def gather_once(self) -> None:
        """Check together with the other workers that all parts of a sharded model are there."""
        if self.sharded:
            gather_once(self.model)

    def give_up_forward(self) -> None:
        """Clean up after a forward or backward that failed, so that nothing of it stays."""
        if self.sharded:
            reset_blocks(self.model)

    def digest(self) -> str:
        """Return the sha256 of the weights in memory, which a search leaves unchanged.

        Of a sharded model, only this worker's part is hashed.
        """
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
    """Make the error for a model that can't take a prefix."""
    return BadInput(
        f"a {model_type} model can't take a prefix: {reason}",
        "use method prompt_tuning or p_tuning",
    )
