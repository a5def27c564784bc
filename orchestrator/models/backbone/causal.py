"""Causal models, which run [prompt; input; target] in one stack.

A prompt can be put in front of a row in two exact ways; docs/decisions/0002-prompts-once.md
has the measurements:

* **prompt once**: the K prompts run through the model as [K, P, H], and all rows share their keys
  and values. In a causal model a prompt attends only to itself, so its keys and values are the same
  for every row. This is prefix caching that stays differentiable. Prompts are padded on the right,
  rows on the left, and positions are explicit. A prefix already consists of keys and values.
* **plain**: each row runs with its own copy of the prompt, padded on the right. This is exact for
  every causal model, also with sliding windows. A prefix is padded on the left here, so that no
  padding stands between the prefix and its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.models.backbone.attention import install_grouped
from orchestrator.models.backbone.base import Backbone, Ids, no_prefix
from orchestrator.models.backbone.prepared_prompts import (
    Part,
    PreparedPrompts,
    PromptTensors,
    pad_part,
)
from orchestrator.models.backbone.rotary import install_rowwise
from orchestrator.models.backbone.rows import Rows
from orchestrator.models.backbone.sharding import through_last_block
from orchestrator.models.placeholders import placed
from orchestrator.models.rope import rope_switches
from orchestrator.models.source import BaseModelInfo, Family
from orchestrator.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# Families whose loss and gradient with the prompt run once were checked, in float64, to agree with
# those of unpadded rows (docs/decisions/0002-prompts-once.md).
PROMPT_ONCE_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi", "falcon", "olmo2", "granite"}
)


@dataclass
class CausalState:
    """Rows after a forward.

    ``logits`` [B, V] are those of the last column and ``cache`` has the keys and values so far.
    ``mask`` covers all columns so far. ``positions`` [B] are each row's next position.
    """

    logits: Tensor
    cache: Cache
    mask: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> CausalState:
        """Return the state of the given rows, in that order; a row may appear several times."""
        from orchestrator.models.backbone import cache

        return CausalState(
            self.logits[rows], cache.select(self.cache, rows), self.mask[rows], self.positions[rows]
        )

    @classmethod
    def join(cls, states: Sequence[CausalState]) -> CausalState:
        """Join the rows of all states, in order, so that they share a forward.

        Columns that are padding in every row are dropped. A batch whose rows come and go is
        therefore never wider than its longest row.
        """
        from orchestrator.models.backbone import cache

        joined_cache, mask = cache.join(
            [state.cache for state in states], [state.mask for state in states]
        )
        logits, positions = (
            torch.cat([getattr(state, name) for state in states])
            for name in ("logits", "positions")
        )
        return cls(logits, joined_cache, mask, positions)


class CausalBackbone(Backbone):
    """A frozen causal language model with its tokenizer."""

    family: ClassVar[Family] = "causal"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        info: BaseModelInfo,
        prompt_once: bool | None = None,
    ) -> None:
        super().__init__(model, tokenizer, info)
        switches = rope_switches(model.config, info.context_length)
        if switches:
            install_rowwise(model, switches)
        # Beyond the LongRoPE switch a row needs other prompt keys than a short row does, so rows of
        # a model with a switch can't share their prompt's keys.
        once = runs_prompt_once(model.config) and not switches
        self.prompt_once = once if prompt_once is None else prompt_once
        # The whole length, answer included, decides about the positions of all tokens. A beginning
        # therefore has other log-probabilities in a longer answer, and answers can't share it.
        self.answers_as_tree = not switches
        if self.prompt_once:
            from orchestrator.models.backbone import last_block

            last_block.watch(model)
            install_grouped(model)

    @property
    def continues(self) -> bool:
        return self.prompt_once

    @property
    def branches(self) -> bool:
        return self.prompt_once

    # Prompts

    def prepare(self, prompts: Sequence[Tensor | PromptTensors]) -> PreparedPrompts:
        """Prepare the prompts as keys and values, or as embeddings on the plain path.

        Prefixes are keys and values on both paths. Raises BadInput when soft prompts and prefixes
        are mixed on the plain path.
        """
        prompt_tensors = [PromptTensors.of(prompt) for prompt in prompts]
        for prompt in prompt_tensors:
            self.check_prefix(prompt.prefixes)
        parts = self._embedding_part(prompt_tensors, inside=True)
        if self.prompt_once:
            parts |= self._cache_part(prompt_tensors)
        else:
            parts |= self._embedding_part(prompt_tensors, inside=False)
            parts |= self._prefix_part(prompt_tensors)
            if not self.shares_forward(frozenset(parts)):
                raise BadInput(
                    f"soft prompts and prefixes can't share a forward of a {self.info.model_type} "
                    "model"
                )
        return PreparedPrompts(parts, len(prompt_tensors))

    def shares_forward(self, kinds: frozenset[str]) -> bool:
        """Return whether prompts of these kinds can run in one forward.

        On the plain path, prefixes and soft prompts run in separate forwards. Otherwise every row
        would carry the columns of the longest prefix.
        """
        return self.prompt_once or not kinds >= {"front", "cache"}

    def _cache_part(self, prompts: Sequence[PromptTensors]) -> dict[str, Part]:
        soft_indices = [
            index
            for index, prompt in enumerate(prompts)
            if prompt.embeddings is not None and not prompt.inside
        ]
        members: list[tuple[Tensor, ...] | None] = [_layers(prompt) for prompt in prompts]
        if soft_indices:
            lengths = [len(prompts[index].embeddings) for index in soft_indices]  # type: ignore[arg-type]
            layers = self._prompt_cache([prompts[index].embeddings for index in soft_indices])  # type: ignore[misc]
            if len(soft_indices) == len(prompts):
                return {"cache": Part(layers, torch.tensor(lengths, device=self.device))}
            for row, (index, length) in enumerate(zip(soft_indices, lengths, strict=True)):
                members[index] = tuple(tensor[row, :, :length] for tensor in layers)
        return {"cache": pad_part(members, self.table)} if any(members) else {}

    def _prompt_cache(self, prompts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run soft prompts; return key and value of each layer, [K, kv heads, P, head width]."""
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(
            self.device, self.table.dtype
        )
        width = padded.shape[1]
        # Only keys and values are read here, so the last block may compute a single output column.
        with self._reading(_cache(()), keep=1) as cache:
            # Prompts are padded on the right, where no real virtual token attends. Rows mask the
            # padding later.
            out = self._body(
                inputs_embeds=padded,
                attention_mask=torch.ones(
                    1, 1, width, width, dtype=torch.bool, device=self.device
                ).tril(),
                position_ids=torch.arange(width, device=self.device)[None],
                past_key_values=cache,
                use_cache=True,
            )
        cache = tuple(
            tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)
        )
        return through_last_block(out.last_hidden_state, cache) if self.sharded else cache

    def _prefix_part(self, prompts: Sequence[PromptTensors]) -> dict[str, Part]:
        members = [_layers(prompt) for prompt in prompts]
        return {"cache": pad_part(members, self.table)} if any(members) else {}

    def activations(self, embeddings: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache

        body: Any = self.model.base_model
        if "past_key_values" not in inspect.signature(body.forward).parameters:
            raise no_prefix(self.info.model_type, "it keeps no keys and values")
        cache = DynamicCache()  # a model's own cache would drop columns outside a layer's window
        self._body(
            inputs_embeds=embeddings.to(self.table)[None], past_key_values=cache, use_cache=True
        )
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if not layers or len({tensor.shape for layer in layers for tensor in layer}) > 1:
            raise no_prefix(self.info.model_type, "its layers differ in heads or widths")
        return {"decoder": torch.stack([torch.cat(layer) for layer in layers])}

    # Rows

    def teacher_forced(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [B, Y, V] that predict the targets, and the padded targets [B, Y].

        The last target token is not fed, because nothing is predicted from it. Targets end at the
        right edge.
        """
        fed = [
            [*ids, *target[:-1]]
            for ids, target in zip(self._placed_rows(prompts, inputs, prompt), targets, strict=True)
        ]
        longest = max(map(len, targets))
        padded = [[*[-100] * (longest - len(target)), *target] for target in targets]
        logits = self.target_logits(prompts, Rows.pad(fed, prompt, self.device), longest)
        return logits, torch.tensor(padded, device=self.device)

    def _placed_rows(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> Sequence[Ids]:
        if all(min(ids, default=0) >= 0 for ids in inputs):
            return inputs
        counts = self.inner_counts(prompts, prompt)
        return [placed(ids, count) or [0] for ids, count in zip(inputs, counts, strict=True)]

    def target_logits(self, prompts: PreparedPrompts | None, rows: Rows, keep: int) -> Tensor:
        """Return logits [B, keep, V] at the last ``keep`` columns of the rows.

        The rows end at the right edge. ``prompts=None`` runs the model without a prompt.
        """
        if not self.prompt_once:
            return self._plain(prompts, rows, keep)
        logits: Tensor = self._continue(prompts, rows, keep)[0].logits
        return logits

    def start(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> CausalState:
        return self.run(
            prompts, Rows.pad(self._placed_rows(prompts, inputs, prompt), prompt, self.device)
        )

    def run(self, prompts: PreparedPrompts | None, rows: Rows) -> CausalState:
        """Run the rows; return the state to continue from, with the last column's logits.

        Needs the prompt-once path.
        """
        from orchestrator.models.backbone.cache import ROOM

        out, mask, positions = self._continue(prompts, rows, keep=1, room=ROOM)
        return CausalState(out.logits[:, -1], out.past_key_values, mask, positions[:, -1] + 1)

    def extend(self, state: CausalState, ids: Tensor, mask: Tensor) -> tuple[Tensor, CausalState]:
        full = torch.cat([state.mask, mask], dim=1)
        positions = state.positions[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids,
            attention_mask=full.long(),
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        )
        return out.logits, CausalState(
            out.logits[:, -1], out.past_key_values, full, state.positions + mask.sum(1)
        )

    def start_along(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
        room: int,
    ) -> tuple[Tensor, Tensor, CausalState]:
        """Run the inputs and targets; return logits and targets as ``teacher_forced`` does.

        The state has room for ``room`` more columns. It stands at the end of the inputs: its mask
        hides the last columns, which hold the targets without their last tokens and end at the
        right edge. Needs the prompt-once path.
        """
        placed_rows = self._placed_rows(prompts, inputs, prompt)
        fed = [[*ids, *target[:-1]] for ids, target in zip(placed_rows, targets, strict=True)]
        longest = max(map(len, targets))
        rows = Rows.pad(fed, prompt, self.device)
        out, mask, positions = self._continue(prompts, rows, keep=longest, room=room)
        padded = [[*[-100] * (longest - len(target)), *target] for target in targets]
        fed_tokens = torch.tensor([len(target) - 1 for target in targets], device=self.device)
        column = torch.arange(mask.shape[1], device=self.device)[None, :]
        inputs_only = mask & (column < mask.shape[1] - fed_tokens[:, None])
        state = CausalState(
            out.logits[:, -1], out.past_key_values, inputs_only, positions[:, -1] + 1 - fed_tokens
        )
        return out.logits, torch.tensor(padded, device=self.device), state

    def branch(self, state: CausalState, ids: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        """Run tokens [B, n] that may belong to different continuations; return logits [B, n, V].

        ``sees`` [B, n, C + n] is true at the columns that a token attends to, among the C columns
        of the state's cache and the new ones. The cache grows by the new columns.
        """
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=sees[:, None],
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        ).logits
        return logits

    def _continue(
        self, prompts: PreparedPrompts | None, rows: Rows, keep: int, room: int = 0
    ) -> tuple[CausalLMOutputWithPast, Tensor, Tensor]:
        """Run the rows after their prompts' keys and values; return output, mask and positions.

        The mask covers the prompts' columns and the rows' columns. Reserve cache space for ``room``
        more columns, so that they can follow without another copy of the cache.
        """
        mask, positions = rows.mask, (rows.mask.cumsum(1) - 1).clamp(min=0)
        width = rows.ids.shape[1]
        part = prompts.parts.get("cache") if prompts is not None else None
        if part is not None:
            mask = torch.cat([part.mask(rows.prompt), mask], dim=1)
            positions = positions + part.lengths[rows.prompt][:, None]
        with self._reading(_rows_cache(part, rows.prompt, width + room), keep) as cache:
            out = self.model(
                **self._entering(prompts, rows),
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                # Indices make a contiguous copy. With a count the model would take a view, and
                # torch would multiply with the head's whole frozen matrix once for every row.
                logits_to_keep=torch.arange(width - keep, width, device=self.device),
            )
        return out, mask, positions

    def _reading(self, cache: Cache, keep: int) -> AbstractContextManager[Cache]:
        """Return the context of a forward of which only the last ``keep`` columns are read.

        A sharded model runs its last block on all columns, because all of a sharded block has to
        run exactly once.
        """
        from orchestrator.models.backbone import last_block

        return nullcontext(cache) if self.sharded else last_block.reading(cache, keep)

    def _entering(self, prompts: PreparedPrompts | None, rows: Rows) -> dict[str, Tensor]:
        if prompts is not None and "inner" in prompts.parts:
            return {"inputs_embeds": self.row_embeddings(prompts, rows.ids, rows.prompt)}
        return {"input_ids": rows.ids}

    def _plain(self, prompts: PreparedPrompts | None, rows: Rows, keep: int) -> Tensor:
        """Run [prompt; row; pads] as one row; return logits [B, keep, V] at the last columns.

        Each row is gathered so that it stands right after its prompt, without padding in between.
        """
        embeddings = self.row_embeddings(prompts, rows.ids, rows.prompt)
        front = prompts.parts.get("front") if prompts else None
        prefix = prompts.parts.get("cache") if prompts else None
        lengths = front.lengths[rows.prompt] if front else rows.prompt.new_zeros(len(rows.prompt))
        width = front.width if front else 0
        left_pads = rows.ids.shape[1] - rows.mask.sum(1)
        column = torch.arange(width + rows.ids.shape[1], device=self.device)[None, :].expand(
            len(rows.ids), -1
        )
        source = torch.cat([*(front.of_rows(rows.prompt) if front else ()), embeddings], dim=1)
        from_row = column + (width + left_pads - lengths)[:, None]
        index = torch.where(
            column < lengths[:, None], column, from_row.clamp(max=source.shape[1] - 1)
        )
        embeds = source.gather(1, index[:, :, None].expand(-1, -1, source.shape[2]))
        ends = lengths + rows.mask.sum(1)
        kept_columns = (ends[:, None] - keep + torch.arange(keep, device=self.device)).clamp(min=0)
        first = int(kept_columns.min())
        logits = self.model(
            inputs_embeds=embeds,
            logits_to_keep=torch.arange(first, column.shape[1], device=self.device),
            **self._behind(prefix, rows, column, ends),
        ).logits
        return torch.take_along_dim(logits, (kept_columns - first)[:, :, None], dim=1)

    def _behind(
        self, prefix: Part | None, rows: Rows, positions_in_row: Tensor, ends: Tensor
    ) -> dict[str, Any]:
        """Return mask, positions and cache of right-padded rows after their prefix, if any.

        The prefix is padded on the left. Padding after a row repeats the row's last position, so
        that the largest position of a row tells how long the row is.
        """
        mask = positions_in_row < ends[:, None]
        positions_in_row = positions_in_row.minimum(ends[:, None] - 1)
        if prefix is None:
            positions = {"position_ids": positions_in_row} if self._takes_positions else {}
            return {"attention_mask": mask.long(), "use_cache": False, **positions}
        lengths = prefix.lengths[rows.prompt]
        prefix_column = (
            torch.arange(prefix.width, device=self.device)[None, :]
            - (prefix.width - lengths)[:, None]
        )
        prefix_layers = [
            tensor.gather(
                2,
                prefix_column.clamp(min=0)[:, None, :, None].expand(
                    -1, tensor.shape[1], -1, tensor.shape[3]
                ),
            )
            for tensor in prefix.of_rows(rows.prompt)
        ]
        positions = (
            {"position_ids": positions_in_row + lengths[:, None]} if self._takes_positions else {}
        )
        full_mask = torch.cat([prefix_column >= 0, mask], dim=1)
        return {
            "attention_mask": full_mask.long(),
            "past_key_values": _cache(prefix_layers),
            "use_cache": True,
            **positions,
        }

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def _body(self, **inputs: Any) -> BaseModelOutputWithPast:
        """Run the model without its head, whose [K, P, V] logits are not needed."""
        return self.model.base_model(**inputs)  # type: ignore[operator]


def _layers(prompt: PromptTensors) -> tuple[Tensor, ...] | None:
    """Return key and value of each layer of a prefix, [kv heads, P, head width]."""
    tensor = prompt.prefixes.get("decoder")
    return None if tensor is None else tuple(tensor.flatten(0, 1).unbind(0))


def _rows_cache(part: Part | None, prompt: Tensor, further: int) -> Cache:
    """Return the cache that rows continue from, with room for ``further`` columns.

    The cache grows in place only outside of training, where no gradient is needed.
    """
    from orchestrator.models.backbone import cache

    if torch.is_grad_enabled():
        return _cache(() if part is None else part.of_rows(prompt))
    return cache.empty_cache() if part is None else cache.rows_cache(part.tensors, prompt, further)


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """Make a transformers cache from the rows' keys and values.

    Every layer keeps all columns, also layers with a sliding window.
    """
    from transformers import DynamicCache

    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def runs_prompt_once(config: PreTrainedConfig) -> bool:
    """Return whether the prompt may run once for all rows.

    The model must be of a checked family, have no ALiBi, and attend to all columns in every layer.
    """
    layers = getattr(config, "layer_types", None)
    if layers:
        full = all(kind == "full_attention" for kind in layers)
    else:
        full = not getattr(config, "sliding_window", None)
    return (
        config.model_type in PROMPT_ONCE_FAMILIES and full and not getattr(config, "alibi", False)
    )
