"""Encoder-decoder models: [prompt; input] in the encoder, the target in the decoder.

A soft prompt stands in front of the encoder's input (Lester et al. 2021). A prefix stands in the
self-attention of encoder and decoder, and in the cross-attention (Li & Liang 2021, section 4, and
their code for BART).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.models.backbone.base import Ids
from orchestrator.models.backbone.encoder import EncodingBackbone
from orchestrator.models.backbone.prepared_prompts import PreparedPrompts
from orchestrator.models.backbone.rows import Rows, pad_right
from orchestrator.models.placeholders import placed
from orchestrator.models.source import Family

if TYPE_CHECKING:
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import Seq2SeqLMOutput


@dataclass
class Seq2SeqState:
    """Rows whose input is encoded.

    ``logits`` [B, V] are those of the last decoder column. ``encoded`` [B, T, H] is the encoder's
    output with its ``mask``, ``cache`` is the decoder's, and ``prompt`` [B] is the index of each
    row's prompt.
    """

    logits: Tensor
    encoded: Tensor
    mask: Tensor
    cache: EncoderDecoderCache
    prompts: PreparedPrompts | None
    prompt: Tensor

    def select(self, rows: Tensor) -> Seq2SeqState:
        """Return the state of the given rows, in that order; a row may appear several times."""
        return Seq2SeqState(
            self.logits[rows],
            self.encoded.index_select(0, rows),
            self.mask[rows],
            _selected(self.cache, rows),
            self.prompts,
            self.prompt[rows],
        )


class Seq2SeqBackbone(EncodingBackbone):
    """A frozen encoder-decoder model with its tokenizer."""

    family: ClassVar[Family] = "seq2seq"

    @property
    def continues(self) -> bool:
        return True

    @property
    def start_id(self) -> int:
        """The token that the decoder starts from."""
        config = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(self.model.generation_config, "decoder_start_token_id", None)
        return int(config.pad_token_id if start is None else start)  # type: ignore[union-attr,arg-type]

    @cached_property
    def sites(self) -> dict[str, list[nn.Module]]:
        """The attention modules of each site, layer by layer.

        The number of keys tells the decoder's self-attention from its cross-attention.
        """
        ids = torch.zeros(1, 3, dtype=torch.long, device=self.device)
        model, decoder = self.model, self.model.get_decoder()  # type: ignore[operator]

        def run() -> Seq2SeqLMOutput:
            return model(input_ids=ids, decoder_input_ids=ids[:, :2], use_cache=False)

        with torch.inference_mode():
            return {
                "encoder": self._recorded_keys(run, model.get_encoder(), 3)[0],  # type: ignore[operator]
                "decoder": self._recorded_keys(run, decoder, 2)[0],
                "cross": self._recorded_keys(run, decoder, 3)[0],
            }

    def activations(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the keys and values that a soft prompt [P, H] has in this model.

        The prompt runs as the input of the encoder and of the decoder.
        """
        inputs, model = embeddings.to(self.table)[None], self.model
        length = len(embeddings)

        def run() -> Seq2SeqLMOutput:
            # The decoder gets one more column than the encoder, so that the number of keys tells
            # self-attention from cross-attention. A later column doesn't change earlier ones.
            longer = torch.cat([inputs, inputs[:, -1:]], dim=1)
            return model(inputs_embeds=inputs, decoder_inputs_embeds=longer, use_cache=False)

        decoder = model.get_decoder()  # type: ignore[operator]
        return {
            "encoder": self._recorded_keys(run, model.get_encoder(), length)[1],  # type: ignore[operator]
            "decoder": self._recorded_keys(run, decoder, length + 1)[1][..., :length, :],
            "cross": self._recorded_keys(run, decoder, length)[1],
        }

    def teacher_forced(
        self,
        prompts: PreparedPrompts | None,
        inputs: Sequence[Ids],
        targets: Sequence[Ids],
        prompt: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [B, Y, V] that predict the targets, and the padded targets [B, Y].

        The decoder reads its start token and then the target without its last token. Targets start
        at the left edge.
        """
        encoded, mask, rows = self._encode(prompts, inputs, prompt)
        fed = Rows.pad(
            [[self.start_id, *target[:-1]] for target in targets], prompt, self.device, left=False
        )
        logits = self._decode(prompts, rows, encoded, mask, fed.ids, cache=None).logits
        return logits, pad_right(targets, -100, self.device)

    def start(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> Seq2SeqState:
        from transformers import DynamicCache, EncoderDecoderCache

        encoded, mask, rows = self._encode(prompts, inputs, prompt)
        first = torch.full((len(inputs), 1), self.start_id, device=self.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        out = self._decode(prompts, rows, encoded, mask, first, cache)
        return Seq2SeqState(out.logits[:, -1], encoded, mask, out.past_key_values, prompts, rows)

    def extend(self, state: Seq2SeqState, ids: Tensor, mask: Tensor) -> tuple[Tensor, Seq2SeqState]:
        """Run further tokens of started rows; return logits [B, n, V] and the new state.

        All rows are extended by n columns. Columns after the end of a row have no meaning.
        """
        out = self._decode(state.prompts, state.prompt, state.encoded, state.mask, ids, state.cache)
        after = Seq2SeqState(
            out.logits[:, -1],
            state.encoded,
            state.mask,
            out.past_key_values,
            state.prompts,
            state.prompt,
        )
        return out.logits, after

    def _encode(
        self, prompts: PreparedPrompts | None, inputs: Sequence[Ids], prompt: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoder's output [B, P+T, H], its mask, and each row's prompt index [B]."""
        counts = self.inner_counts(prompts, prompt)
        encoder_inputs = [
            placed(ids, count) or [0] for ids, count in zip(inputs, counts, strict=True)
        ]
        rows = Rows.pad(encoder_inputs, prompt, self.device, left=False)
        embeddings, mask, _ = self.encoder_rows(prompts, rows)
        with self.prefix_of(prompts, rows.prompt, ["encoder"]):
            encoder = self.model.get_encoder()  # type: ignore[operator]
            encoded = encoder(
                inputs_embeds=embeddings, attention_mask=mask.long()
            ).last_hidden_state
        return encoded, mask, rows.prompt

    def _decode(
        self,
        prompts: PreparedPrompts | None,
        rows: Tensor,
        encoded: Tensor,
        mask: Tensor,
        ids: Tensor,
        cache: EncoderDecoderCache | None,
    ) -> Seq2SeqLMOutput:
        """Run decoder columns [B, n], padded on the right.

        The padding does no harm, because causal attention never reads later columns.
        """
        from transformers.modeling_outputs import BaseModelOutput

        with self.prefix_of(prompts, rows, ["decoder", "cross"]):
            return self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=mask.long(),
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )


def _selected(cache: EncoderDecoderCache, rows: Tensor) -> EncoderDecoderCache:
    from transformers import DynamicCache, EncoderDecoderCache

    def pick(part: DynamicCache) -> DynamicCache:
        return DynamicCache(
            [
                (layer.keys.index_select(0, rows), layer.values.index_select(0, rows))
                for layer in part.layers
            ]
        )

    selected = EncoderDecoderCache(
        pick(cache.self_attention_cache), pick(cache.cross_attention_cache)
    )
    selected.is_updated = dict.fromkeys(range(len(cache.self_attention_cache.layers)), True)
    return selected
