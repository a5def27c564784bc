"""The ladder: small models of three families in three sizes, for the papers' experiments.

The models are made on the spot: ``causal-s`` to ``-l`` (Llama), ``encdec-s`` to ``-l`` (T5, span
corruption) and ``masked-s`` to ``-l`` (BERT). An encoder-decoder model whose name ends with
``-lm100`` has been adapted to the prefix LM objective for 100 more steps. All models of a family
read the same documents. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, TypeAlias

from orchestrator.models.builtin.corpus import Document
from orchestrator.models.builtin.labels import label_documents
from orchestrator.models.builtin.language_model import (
    BOS_ID,
    EOS,
    EOS_ID,
    PAD_ID,
    Recipe,
    Row,
    batches,
    encode,
    fit,
    padded,
    save,
    train,
    train_tokenizer,
)
from orchestrator.models.builtin.making import Progress, made_once
from orchestrator.models.builtin.objectives import IGNORED, Pair, cut_in_two, masked, span_corrupted

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

Kind: TypeAlias = Literal["causal", "encdec", "masked"]
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(32))
MASK = "<mask>"
ADAPTATIONS = (25, 100, 400)
"""Numbers of LM adaptation steps for which there are models."""


@dataclass(frozen=True)
class Rung(Recipe):
    """All settings that determine a model of the ladder."""

    version: int = 1
    vocab_size: int = 768
    kind: Kind = "causal"
    adaptation_steps: int = 0


def _rungs() -> dict[str, Rung]:
    # The other objectives take out only some of the labels, so they need twice the documents to
    # learn from as many labels.
    documents: Mapping[Kind, int] = {"causal": 12_000, "encdec": 24_000, "masked": 24_000}
    # Width and layers. An encoder and a decoder have as many layers each.
    shapes: Mapping[Kind, Mapping[str, tuple[int, int]]] = {
        "causal": {"s": (64, 2), "m": (128, 3), "l": (192, 5)},
        "encdec": {"s": (64, 2), "m": (96, 3), "l": (128, 4)},
        "masked": {"s": (64, 2), "m": (128, 3), "l": (192, 5)},
    }
    rungs = {
        f"{kind}-{size}": Rung(
            kind=kind,
            hidden_size=width,
            layers=layers,
            intermediate_size=43 * width // 16,
            documents=documents[kind],
        )
        for kind, of_kind in shapes.items()
        for size, (width, layers) in of_kind.items()
    }
    for size in "sml":
        for steps in ADAPTATIONS:
            rungs[f"encdec-{size}-lm{steps}"] = replace(
                rungs[f"encdec-{size}"], adaptation_steps=steps
            )
    return rungs


RUNGS: Mapping[str, Rung] = _rungs()


def ladder_model(name: str, progress: Progress | None = None, rung: Rung | None = None) -> Path:
    """Return the folder of a model of the ladder, and train the model if it is not cached.

    Raises KeyError for an unknown name.
    """
    rung = rung or RUNGS[name]
    base = None
    if rung.adaptation_steps:
        base = ladder_model(name, progress, replace(rung, adaptation_steps=0))

    def make(folder: Path, bar: Progress) -> None:
        make_rung(folder, rung, bar, base)

    folder_name = name if base else name.partition("-lm")[0]
    return made_once(
        f"{folder_name}-{rung.digest}", make, f"making the model {folder_name}, once", progress
    )


def make_rung(folder: Path, rung: Rung, progress: Progress, base: Path | None = None) -> None:
    """Train a model by ``rung`` and write it as a Hugging Face folder.

    An adaptation starts from the model in the folder ``base``.
    """
    texts = label_documents(rung.documents, rung.seed)
    more = {"causal": (), "encdec": SENTINELS, "masked": (MASK,)}[rung.kind]
    tokenizer = train_tokenizer([text.text for text in texts[::6]], rung.vocab_size, more)
    if rung.kind == "causal":
        model = train(encode(texts, tokenizer, rung), tokenizer.get_vocab_size(), rung, progress)
        save(folder, model, tokenizer, rung)
    elif rung.kind == "masked":
        _close(tokenizer, f"<s> $A {EOS}")
        save(
            folder,
            _train_masked(texts, tokenizer, rung, progress),
            tokenizer,
            rung,
            mask_token=MASK,
        )
    else:
        _close(tokenizer, f"$A {EOS}")
        model = _train_encdec(texts, tokenizer, rung, progress, base)
        save(folder, model, tokenizer, rung, extra_special_tokens=list(SENTINELS))


def _close(tokenizer: Tokenizer, single: str) -> None:
    """Make the tokenizer put special tokens around every text, by the template ``single``."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS_ID), (EOS, EOS_ID)]
    )


def _plain_rows(texts: Sequence[Document], tokenizer: Tokenizer, rung: Rung) -> list[Row]:
    """Encode documents without special tokens.

    A document's preface stands in front of its text, as a soft prompt does.
    """
    rows = []
    for row in encode(texts, tokenizer, rung):
        is_text = [token > PAD_ID for token in row.ids]
        rows.append(Row(list(compress(row.ids, is_text)), list(compress(row.weights, is_text))))
    return rows


def _train_encdec(
    texts: Sequence[Document],
    tokenizer: Tokenizer,
    rung: Rung,
    progress: Progress,
    base: Path | None,
) -> PreTrainedModel:
    random, weight = Random(f"spans-{rung.seed}"), rung.answer_weight
    rows = _plain_rows(texts, tokenizer, rung)
    if base is None:
        sentinels = [tokenizer.get_vocab()[mark] for mark in SENTINELS]
        pairs = [span_corrupted(random, row, weight, sentinels, EOS_ID) for row in rows]
        return fit(
            _drawn(rung, _t5(rung, tokenizer)), batches(pairs, rung), decoder_loss, rung, progress
        )
    from transformers import T5ForConditionalGeneration

    # Skip the first quarter: its documents name all facets, which no later prompt asks for.
    usable_rows = rows[len(rows) // 4 :]
    adaptation_rows = random.choices(usable_rows, k=rung.adaptation_steps * rung.batch_rows)
    pairs = [cut_in_two(random, row, weight, EOS_ID) for row in adaptation_rows]
    model = T5ForConditionalGeneration.from_pretrained(base)
    adaptation_recipe = replace(
        rung,
        matrix_learning_rate=rung.matrix_learning_rate / 4,
        learning_rate=rung.learning_rate / 4,
    )
    return fit(model, batches(pairs, rung), decoder_loss, adaptation_recipe, progress)


def _train_masked(
    texts: Sequence[Document], tokenizer: Tokenizer, rung: Rung, progress: Progress
) -> PreTrainedModel:
    random, mask = Random(f"masks-{rung.seed}"), tokenizer.get_vocab()[MASK]
    rows = _plain_rows(texts, tokenizer, rung)
    pairs = [masked(random, row, rung.answer_weight, BOS_ID, EOS_ID, mask) for row in rows]
    return fit(
        _drawn(rung, _bert(rung, tokenizer)), batches(pairs, rung), masked_loss, rung, progress
    )


def _drawn(rung: Rung, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Make a model with random weights, and leave the caller's random state as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rung.seed)
        return make()


def _t5(rung: Rung, tokenizer: Tokenizer) -> Callable[[], PreTrainedModel]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=rung.hidden_size,
        d_kv=rung.hidden_size // rung.heads,
        d_ff=2 * rung.hidden_size,
        num_layers=rung.layers,
        num_decoder_layers=rung.layers,
        num_heads=rung.heads,
        dropout_rate=0.0,
        n_positions=rung.context,
        tie_word_embeddings=True,
        decoder_start_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return lambda: T5ForConditionalGeneration(config)


def _bert(rung: Rung, tokenizer: Tokenizer) -> Callable[[], PreTrainedModel]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=rung.hidden_size,
        num_hidden_layers=rung.layers,
        num_attention_heads=rung.heads,
        intermediate_size=2 * rung.hidden_size,
        max_position_embeddings=rung.context,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=rung.initializer_range,
        pad_token_id=PAD_ID,
    )
    return lambda: BertForMaskedLM(config)


def decoder_loss(model: PreTrainedModel, batch: Sequence[Pair]) -> torch.Tensor:
    """Return the weighted mean loss over a batch's targets.

    The decoder reads its start token and then the target without its last token.
    """
    inputs = padded([pair.ids for pair in batch], PAD_ID)
    fed = padded([[PAD_ID, *pair.targets[:-1]] for pair in batch], PAD_ID)
    logits = model(
        input_ids=inputs,
        attention_mask=(inputs != PAD_ID).long(),
        decoder_input_ids=fed,
        use_cache=False,
    ).logits
    return _weighted(logits, batch)


def masked_loss(model: PreTrainedModel, batch: Sequence[Pair]) -> torch.Tensor:
    """Return the weighted mean loss over a batch's masked places."""
    inputs = padded([pair.ids for pair in batch], PAD_ID)
    return _weighted(
        model(input_ids=inputs, attention_mask=(inputs != PAD_ID).long()).logits, batch
    )


def _weighted(logits: torch.Tensor, batch: Sequence[Pair]) -> torch.Tensor:
    """Return the weighted mean loss of ``logits`` [B, T, V] over the places that have a target."""
    import torch

    targets = padded([pair.targets for pair in batch], IGNORED).flatten()
    weights = padded([pair.weights for pair in batch], 0.0).flatten() * (targets != IGNORED)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights).sum() / weights.sum()
