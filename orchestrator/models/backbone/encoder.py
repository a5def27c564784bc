"""The shared base of encoder-decoder and masked backbones.

Their encoders read inputs in both directions, with prompts in front of the inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from orchestrator.models.backbone.attention import (
    called_modules,
    install_prefixes,
    layer_prefixes,
    prefixed,
    recorded,
)
from orchestrator.models.backbone.base import Backbone
from orchestrator.models.backbone.prepared_prompts import (
    SITES,
    PreparedPrompts,
    PromptTensors,
    pad_part,
)
from orchestrator.models.backbone.rows import Rows
from orchestrator.models.source import BaseModelInfo
from orchestrator.models.tokenizer import Tokenizer


class EncodingBackbone(Backbone):
    """A model whose encoder attends to the whole input.

    Such a model can't run a prompt once for all rows, and a prefix has to be put into the
    attention.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, info: BaseModelInfo) -> None:
        super().__init__(model, tokenizer, info)
        install_prefixes(model)

    @cached_property
    @abstractmethod
    def sites(self) -> dict[str, list[nn.Module]]:
        """The attention modules, layer by layer, of each site that a prefix has."""

    def prepare(self, prompts: Sequence[Tensor | PromptTensors]) -> PreparedPrompts:
        prompt_tensors = [PromptTensors.of(prompt) for prompt in prompts]
        for prompt in prompt_tensors:
            self.check_prefix(prompt.prefixes)
        parts = self._embedding_part(prompt_tensors, inside=True)
        parts |= self._embedding_part(prompt_tensors, inside=False)
        for site in SITES:
            members = [
                None
                if (tensor := prompt.prefixes.get(site)) is None
                else tuple(tensor.flatten(0, 1).unbind(0))
                for prompt in prompt_tensors
            ]
            if any(members):
                parts[site] = pad_part(members, self.table)
        return PreparedPrompts(parts, len(prompt_tensors))

    @contextmanager
    def prefix_of(
        self, prompts: PreparedPrompts | None, rows: Tensor, sites: Sequence[str]
    ) -> Iterator[None]:
        """Let the sites' attention see each row's prefix within this context.

        ``rows`` [B] are indices among the prompts.
        """
        layer_prefixes_of_rows = {}
        for site in sites:
            if prompts is not None and (part := prompts.parts.get(site)):
                layer_prefixes_of_rows.update(
                    layer_prefixes(self.sites[site], part.of_rows(rows), part.mask(rows))
                )
        with prefixed(layer_prefixes_of_rows):
            yield

    def encoder_rows(
        self, prompts: PreparedPrompts | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed [prompt; row; pads] without padding between prompt and row.

        Return the embeddings [B, P+T, H], their mask, and the number of virtual tokens in front of
        each row [B]. Rows are padded on the right.
        """
        embeddings = self.row_embeddings(prompts, rows.ids, rows.prompt)
        front = prompts.parts.get("front") if prompts else None
        if front is None:
            return embeddings, rows.mask, rows.prompt.new_zeros(len(rows.prompt))
        lengths = front.lengths[rows.prompt][:, None]
        ends = lengths + rows.mask.sum(1, keepdim=True)
        source = torch.cat([*front.of_rows(rows.prompt), embeddings], dim=1)
        column = torch.arange(source.shape[1], device=self.device)[None, :]
        from_row = (column + front.width - lengths).clamp(max=source.shape[1] - 1)
        index = torch.where(column < lengths, column, from_row)
        width = int(ends.max())
        index, column = index[:, :width], column[:, :width]
        return (
            source.gather(1, index[:, :, None].expand(-1, -1, source.shape[2])),
            column < ends,
            lengths[:, 0],
        )

    def _recorded_keys(
        self, run: Callable[[], object], within: nn.Module, keys: int
    ) -> tuple[list[nn.Module], Tensor]:
        """Find the attention modules that see ``keys`` keys when ``run`` is called.

        Only modules inside ``within`` count. Return them with their keys and values, [L, 2, kv
        heads, keys, width].
        """
        with recorded() as records:
            run()
        modules = [
            module
            for module in called_modules(records, within)
            if records[module][0].shape[2] == keys
        ]
        return modules, torch.stack([torch.cat(records[module]) for module in modules])
