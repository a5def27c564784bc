"""Make the quickstart language model: tokenizer, weights, and their Hugging Face folder.

Shapes: B rows, T tokens, V vocabulary. torch and transformers are imported inside functions only,
so that the package can be imported without them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from orchestrator.models.builtin.corpus import Document, documents
from orchestrator.models.builtin.making import Progress

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedModel

    M = TypeVar("M", bound=PreTrainedModel)

T = TypeVar("T")

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the model; each recipe has its own folder in the cache."""

    # Raise the version when the world, the corpus or this module changes what the model learns.
    version: int = 2
    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 344
    context: int = 512
    initializer_range: float = 0.05
    # Standard deviation of the embedding table at the start of training. A prompt's learning rate
    # acts relative to this scale.
    embedding_scale: float = 1.0
    documents: int = 15_000
    batch_rows: int = 16
    learning_rate: float = 3e-3  # for embeddings and norms
    warmup_steps: int = 50
    matrix_learning_rate: float = 0.02
    text_weight: float = 0.2  # loss weight of tokens outside answers
    answer_weight: float = 8.0

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """An encoded document."""

    ids: list[int]
    weights: list[float]  # each token's weight in the loss


class HasIds(Protocol):
    @property
    def ids(self) -> list[int]: ...


R = TypeVar("R", bound=HasIds)


def make_language_model(folder: Path, recipe: Recipe, progress: Progress | None = None) -> None:
    """Train by ``recipe`` and write a Hugging Face folder.

    The Auto classes of transformers load the folder without a network.
    """
    texts = documents(recipe.documents, recipe.seed)
    # Every sixth document is enough for a vocabulary, and includes documents of every lesson.
    tokenizer = train_tokenizer([text.text for text in texts[::6]], recipe.vocab_size)
    model = train(encode(texts, tokenizer, recipe), tokenizer.get_vocab_size(), recipe, progress)
    save(folder, model, tokenizer, recipe)


def train_tokenizer(texts: Sequence[str], vocab_size: int, more: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode any text.

    As with Llama, a text gets a begin token in front and no end token. The special tokens ``more``
    follow those for begin, end and padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *more],  # ids 0, 1, 2, ... in this order
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(texts: Sequence[Document], tokenizer: Tokenizer, recipe: Recipe) -> list[Row]:
    """Encode documents as ``preface BOS pieces EOS``, in the same order."""
    strings: list[str] = []
    for text in texts:
        strings += [text.preface, *(piece.text for piece in text.pieces)]
    encoded: Iterator[list[int]] = (
        encoding.ids for encoding in tokenizer.encode_batch_fast(strings, add_special_tokens=False)
    )
    return [_row(text, encoded, recipe) for text in texts]


def _row(text: Document, encoded: Iterator[list[int]], recipe: Recipe) -> Row:
    ids = [*next(encoded), BOS_ID]
    weights = [recipe.text_weight] * len(ids)
    for piece in text.pieces:
        tokens = next(encoded)
        ids += tokens
        weights += [recipe.answer_weight if piece.answer else recipe.text_weight] * len(tokens)
    return Row([*ids, EOS_ID], [*weights, recipe.text_weight])


def batches(rows: Sequence[R], recipe: Recipe, pool_batches: int = 16) -> list[list[R]]:
    """Group rows of similar length into batches, so that there is little padding.

    Batches are shuffled within pools. The order of the pools is that of the rows, so that the order
    of the lessons stays.
    """
    random = Random(recipe.seed)
    ordered: list[list[R]] = []
    size = recipe.batch_rows
    for start in range(0, len(rows), pool_batches * size):
        pool = sorted(rows[start : start + pool_batches * size], key=lambda row: len(row.ids))
        pooled = [pool[first : first + size] for first in range(0, len(pool), size)]
        random.shuffle(pooled)
        ordered += pooled
    return ordered


def train(
    rows: Sequence[Row], vocab_size: int, recipe: Recipe, progress: Progress | None = None
) -> LlamaForCausalLM:
    """Train a new model with one pass over ``rows``, in the order of the lessons.

    The caller's random state is left as it was.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _untrained(vocab_size, recipe)
    return fit(model, batches(rows, recipe), next_token_loss, recipe, progress)


def fit(
    model: M,
    todo: Sequence[T],
    loss: Callable[[M, T], torch.Tensor],
    recipe: Recipe,
    progress: Progress | None = None,
) -> M:
    """Train the model with one step per batch, in order."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    optimizers = _optimizers(model, recipe)
    schedules = [
        LambdaLR(optimizer, lambda step: _rate(step, len(todo), recipe)) for optimizer in optimizers
    ]
    for step_number, batch in enumerate(todo, start=1):
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        if progress is not None:
            progress(step_number, len(todo))
    model.eval()
    return model


def _untrained(vocab_size: int, recipe: Recipe) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=recipe.embedding_scale)
    # The table is also the output layer. A small norm scale before it keeps the first logits small.
    torch.nn.init.constant_(model.model.norm.weight, 0.05 / recipe.embedding_scale)
    return model


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, and AdamW for embeddings and the norms' scales."""
    import torch

    from orchestrator.models.builtin.optimizer import Muon

    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    matrices = [
        parameter
        for parameter in model.parameters()
        if parameter.dim() == 2 and id(parameter) not in tables
    ]
    other_parameters = [
        parameter
        for parameter in model.parameters()
        if parameter.dim() != 2 or id(parameter) in tables
    ]
    return [
        Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.05),
        torch.optim.AdamW(
            other_parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def _rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the share of the full learning rate: a short warm-up, then a cosine to a twentieth."""
    return min((step + 1) / recipe.warmup_steps, 0.525 + 0.475 * math.cos(math.pi * step / steps))


def next_token_loss(model: LlamaForCausalLM, batch: Sequence[Row]) -> torch.Tensor:
    """Return the weighted mean of a batch's next-token losses.

    The rows are padded at their end to [B, T].
    """
    import torch

    ids = padded([row.ids for row in batch], PAD_ID)
    weights = padded([row.weights for row in batch], 0.0)[:, 1:]
    # No mask is needed: the padding stands at the end, where causal attention never reads it.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def save(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, recipe: Recipe, **special: Any
) -> None:
    """Write the model and its tokenizer to a Hugging Face folder.

    The files are config.json, generation_config.json, model.safetensors, tokenizer.json,
    tokenizer_config.json and recipe.json. A model that can't generate has no
    generation_config.json. ``special`` are further options of the tokenizer, such as special
    tokens.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    # Writing one file of a megabyte needs no progress bar, and ours is already on the screen.
    logging.disable_progress_bar()
    if model.can_generate():
        model.generation_config.update(
            bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
        )
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
        **special,
    )
    wrapped.save_pretrained(folder)
    (folder / "recipe.json").write_text(
        json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8"
    )
