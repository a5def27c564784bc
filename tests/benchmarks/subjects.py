"""Models and rows to measure: random Llamas of several sizes and random rows.

Models are made on the device, without files or network.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch: sets how OpenMP threads wait

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.models.backbone import CausalBackbone
from orchestrator.models.source import BaseModelInfo

CONTEXT = 1024
END = 0


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
        )


TOY = Size(layers=2, width=32, inner=64, heads=4, kv_heads=2, vocabulary=300)
SMALL = Size(layers=6, width=192, inner=512, heads=6, kv_heads=6, vocabulary=4096)
"""About the size of the story model with three million weights."""
MIDDLE = Size(layers=6, width=512, inner=1376, heads=8, kv_heads=8, vocabulary=50_000)
HUNDRED_MILLION = Size(layers=12, width=768, inner=2048, heads=12, kv_heads=12, vocabulary=32_000)
BILLION = Size(layers=16, width=2048, inner=8192, heads=32, kv_heads=8, vocabulary=128_256)
SIZES = {"toy": TOY, "6x192": SMALL, "6x512": MIDDLE, "100M": HUNDRED_MILLION, "1B": BILLION}


def make_model(
    size: Size, device: torch.device, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return a model with random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(size.config())
    finally:
        torch.set_default_dtype(before)


def make_backbone(
    size: Size, device: torch.device, dtype: torch.dtype = torch.float32
) -> CausalBackbone:
    return backbone_of(make_model(size, device, dtype))


def backbone_of(
    model: LlamaForCausalLM, kind: type[CausalBackbone] = CausalBackbone
) -> CausalBackbone:
    config = model.config
    info = BaseModelInfo(
        "bench", "main", "llama", config.hidden_size, config.vocab_size, CONTEXT, "", ""
    )
    return kind(model, make_tokenizer(config.vocab_size), info)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w1, w2, ... with one token each."""
    words = {"<end>": END, **{f"w{place}": place for place in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_encoder(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[str] = ("w1", "w2")
) -> Encoder:
    """Return an encoder for rows of a text and a label, whose answer follows the text."""
    verbalizer = Verbalizer(tuple(range(len(answers))), tuple(f" {answer}" for answer in answers))
    return Encoder(
        tokenizer, Template("{text}"), verbalizer, max_input_tokens=CONTEXT, max_target_tokens=64
    )


def make_rows(
    count: int,
    vocabulary: int,
    shortest: int,
    longest: int | None = None,
    answers: Sequence[Sequence[int]] = ((1,), (2,)),
    seed: int = 0,
) -> Encoded:
    """Return rows of ``shortest`` to ``longest`` input tokens, an answer and the end token.

    Without ``longest`` all rows have ``shortest`` tokens.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, (longest or shortest) + 1, count).tolist()
    inputs = [draw.integers(1, vocabulary, length).tolist() for length in lengths]
    labels = draw.integers(0, len(answers), count).tolist()
    return Encoded(inputs, [[*answers[label], END] for label in labels], labels)


def make_prompts(
    backbone: CausalBackbone, count: int, length: int, seed: int = 0
) -> list[torch.Tensor]:
    """Return soft prompts [P, H] in float32 that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    width = backbone.table.shape[1]
    drawn = [0.02 * torch.randn(length, width, generator=generator) for _ in range(count)]
    return [prompt.to(backbone.device).requires_grad_() for prompt in drawn]


def batches(trials: int, rows: int, of: int) -> list[list[int]]:
    """Return each trial's row numbers, consecutive, from the start again at the last row."""
    return [[(trial * rows + place) % of for place in range(rows)] for trial in range(trials)]
