"""Tiny random models of many families, a small tokenizer, and a task to tune them on: all made on the spot.

They are on the device that TEST_DEVICE names: ``cpu``, ``cuda``, or ``away``, which is in ``other_device``.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch, to which it says how OpenMP's threads wait

# isort: split
import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from orchestrator.data.encoding import Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, CausalBackbone, load_backbone, make_backbone
from orchestrator.models.source import BaseModelInfo, resolve_model
from orchestrator.tuning.engine import Task

torch.set_num_threads(1)  # on models this small a second thread is only waited for
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
if DEVICE == "away":
    import other_device  # noqa: F401  # which makes it

CONTEXT = 160
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "is this message spam or ham?",
    "great good bad terrible movie",
    "a question about a person, a place, a number",
] * 3
WORDS = sorted({word for line in CORPUS for word in line.split()})

# Where a family's small configuration differs from SMALL; None takes a key away.
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
    "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},
    "phi": {},
    "falcon": {"intermediate_size": None, "num_key_value_heads": None},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8},
    "bloom": {},
    "mamba": {"state_size": 4},
}

# Families whose input is read in both directions.
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 1,
        "initializer_factor": 4.0,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "init_std": 0.3,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {}}


def train_tokenizer(vocabulary: int = 330) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded and decoded back; nothing is added in front or behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


@lru_cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@lru_cache
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it for Llama: a space in front of every text, bytes for what the vocabulary lacks, <s>."""
    special = ["<s>", "<end>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    )
    document = json.loads(
        tokenizer.to_str()
    )  # bytes are ordinary tokens: trained as special ones only to be there
    document["added_tokens"] = document["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", unk_token="<unk>"
    )


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama of two layers with its tokenizer, as a model folder."""
    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{**SMALL, **changes},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@lru_cache
def model_folder() -> Path:
    """One saved model for the whole session; tests that damage it work on a copy."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_model(folder)


def load(folder: Path) -> Backbone:
    return load_backbone(resolve_model(BaseModelSpec(id=str(folder))), DEVICE)


@lru_cache
def closing_tokenizer() -> PreTrainedTokenizerFast:
    """The end token behind every text, as encoder-decoder models have it."""
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 0)]
    )
    return tokenizer


@lru_cache
def cloze_tokenizer() -> PreTrainedTokenizerFast:
    """A token in front of every text and one behind it, and a mask token, as masked models have it."""
    tokenizer = train_tokenizer(327)
    tokenizer.add_special_tokens(
        {"cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"}
    )
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", cls), ("<sep>", sep)]
    )
    return tokenizer


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer that goes with a tiny model."""
    if family in SEQ2SEQ:
        return closing_tokenizer()
    return cloze_tokenizer() if family in MASKED else tiny_tokenizer()


def small_config(family: str, **changes: Any) -> Any:
    """The family's configuration, as small as the tests need."""
    wanted = {**SMALL, **FAMILIES.get(family, {}), **changes}
    if family in SEQ2SEQ:
        wanted = {
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            **SEQ2SEQ[family],
            **changes,
        }
    if family in MASKED:
        wanted = {**wanted, "num_key_value_heads": None, **MASKED[family]}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    kept = {key: value for key, value in wanted.items() if value is not None}
    return AutoConfig.for_model(family, vocab_size=len(tiny_tokenizer()), **special, **kept)


@lru_cache
def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        kinds = {
            **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
            **dict.fromkeys(MASKED, AutoModelForMaskedLM),
        }
        model = kinds.get(family, AutoModelForCausalLM).from_config(small_config(family))
        for parameter in (
            model.parameters()
        ):  # biases start at zero and scales at one: too regular to prove much
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


def tiny_backbone(
    family: str = "llama", dtype: torch.dtype = torch.float64, prompt_once: bool | None = None
) -> CausalBackbone:
    """A frozen random model of the family; the weights are shared by all callers."""
    model = tiny_model(family, dtype)
    width = model.get_input_embeddings().weight.shape[1]
    info = BaseModelInfo("tiny", "main", family, width, len(tiny_tokenizer()), CONTEXT, "0", "0")
    return CausalBackbone(model, tiny_tokenizer(), info, prompt_once)


def backbone_of(
    family: str, dtype: torch.dtype = torch.float64, prompt_once: bool | None = None
) -> Backbone:
    """A frozen random model of any family, with a tokenizer of its kind."""
    if family in FAMILIES:
        return tiny_backbone(family, dtype, prompt_once)
    model, tokenizer = tiny_model(family, dtype), tokenizer_of(family)
    assert len(tokenizer) == len(tiny_tokenizer())
    return make_backbone(
        model,
        tokenizer,
        BaseModelInfo("tiny", "main", family, 32, len(tokenizer), CONTEXT, "0", "0"),
    )


def save_family(folder: Path, family: str) -> Path:
    """A tiny random model of any family with its tokenizer, as a model folder."""
    tiny_model(family, torch.float32).save_pretrained(folder)  # type: ignore[operator]
    tokenizer_of(family).save_pretrained(folder)
    return folder


def random_prompts(backbone: Backbone, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """One prompt [P, H] for each length, in the backbone's own dtype, ready for gradients."""
    generator = torch.Generator().manual_seed(seed)
    width = backbone.table.shape[1]
    return [
        torch.randn(length, width, generator=generator).to(backbone.table).requires_grad_()
        for length in lengths
    ]


def random_ids(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token rows of the given lengths, without special tokens."""
    choose = random.Random(seed)
    return [
        [choose.randrange(2, len(tiny_tokenizer())) for _ in range(length)] for length in lengths
    ]


def alone(
    backbone: Backbone, prompt: Tensor | None, ids: Sequence[int], target: Sequence[int]
) -> Tensor:
    """Logits [Y, V] that predict the target of one row: the model itself, no batch, no padding, no mask, no cache."""
    embeds = backbone.embed(torch.tensor([[*ids, *target[:-1]]], device=backbone.device))
    if prompt is not None:
        embeds = torch.cat([prompt[None].to(embeds), embeds], dim=1)
    logits: Tensor = backbone.model(inputs_embeds=embeds, use_cache=False).logits[0]
    return logits[-len(target) :]


def alone_nll(
    backbone: Backbone, prompt: Tensor | None, ids: Sequence[int], target: Sequence[int]
) -> Tensor:
    """Negative log-likelihood of one row's target, summed."""
    logits = alone(backbone, prompt, ids, target)
    return nn.functional.cross_entropy(
        logits, torch.tensor(list(target), device=logits.device), reduction="sum"
    )


def text_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a text of 1 to 9 words, a label 0 or 1, and a short answer to generate."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        text = " ".join(choose.choices(WORDS, k=choose.randint(1, 9)))
        answer = " " + " ".join(choose.choices(WORDS, k=choose.randint(1, 3)))
        rows.append({"text": text, "label": choose.randint(0, 1), "answer": answer})
    return rows


VERBALIZERS = {
    "one token": {0: "!", 1: "?"},
    "several tokens": {0: " a quick no", 1: " yes"},
    "prefix": {0: " good", 1: " good movie"},
}


def encoder_for(answers: str | None = "several tokens") -> Encoder:
    """Encoder with one of VERBALIZERS, or for a generation task."""
    verbalizer = None if answers is None else VERBALIZERS[answers]
    made = verbalizer and Verbalizer(tuple(verbalizer), tuple(verbalizer.values()))
    return Encoder(
        tiny_tokenizer(), Template("{text}\nspam?"), made, max_input_tokens=40, max_target_tokens=32
    )


def small_task(
    answers: str | None = "several tokens", train: int = 20, validation: int = 7
) -> Task:
    encoder = encoder_for(answers)
    column = "answer" if answers is None else "label"
    splits = {
        "train": text_rows(train, 1),
        "validation": text_rows(validation, 2),
        "test": text_rows(5, 3),
    }
    return Task(encoder, {name: encoder.encode(rows, column) for name, rows in splits.items()})
