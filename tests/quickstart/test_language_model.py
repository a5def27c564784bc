"""The quickstart model: a Hugging Face folder, at chance on the task without a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.models.builtin import INSTRUCTIONS, TEMPLATE, VERBALIZER, Recipe, quickstart_rows
from orchestrator.models.builtin.corpus import documents
from orchestrator.models.builtin.language_model import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    encode,
    train_tokenizer,
)
from orchestrator.models.builtin.optimizer import orthogonal

ROWS = quickstart_rows()["test"]


def test_documents_are_encoded_as_the_whole_text_would_be() -> None:
    """Encoding a document in pieces (preface, begin, body, end) moves no token boundary."""
    recipe = Recipe()
    texts = documents(100, seed=0)
    tokenizer = train_tokenizer([text.text for text in texts], recipe.vocab_size)
    for text, row in zip(texts, encode(texts, tokenizer, recipe), strict=True):
        preface = tokenizer.encode(text.preface, add_special_tokens=False).ids
        body = tokenizer.encode(
            "".join(piece.text for piece in text.pieces), add_special_tokens=False
        ).ids
        assert row.ids == [*preface, BOS_ID, *body, EOS_ID] and len(row.weights) == len(row.ids)


def test_orthogonal_keeps_directions_and_evens_out_sizes() -> None:
    """Singular values end near 1, for tall and for wide matrices."""
    torch.manual_seed(0)
    for shape in ((2, 12, 5), (2, 5, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.slow
def test_the_folder_is_an_ordinary_one(model_folder: Path) -> None:
    """The Auto classes load the folder, and its tokenizer encodes any text.

    The tokenizer adds a begin token and no end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        BOS_ID,
        EOS_ID,
        PAD_ID,
    )
    text = "Zoë paid 3 € for it 🙂\tdidn't she?"
    ids = tokenizer(text).input_ids
    assert ids[0] == BOS_ID and ids[-1] != EOS_ID and tokenizer.decode(ids[1:]) == text
    for word in VERBALIZER.values():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert model.config.model_type == "llama" and model.generation_config.eos_token_id == EOS_ID


@pytest.mark.slow
def test_chance_unasked_and_better_with_an_instruction(model_folder: Path) -> None:
    """Without an instruction the model is at chance; with one it is better."""
    assert 0.4 <= _accuracy(model_folder, "") <= 0.62
    assert _accuracy(model_folder, f"{INSTRUCTIONS[0]}\n") > 0.62


def _accuracy(folder: Path, in_front: str) -> float:
    """Return the share of test rows whose verbalizer text is ranked first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = [
        tokenizer(VERBALIZER[label], add_special_tokens=False).input_ids[0]
        for label in ("negative", "positive")
    ]
    batch = tokenizer(
        [in_front + TEMPLATE.format(text=row["text"]) for row in ROWS],
        return_tensors="pt", padding=True, padding_side="right",
    )  # fmt: skip
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    scores = logits[torch.arange(len(ROWS)), last][:, words]
    truth = torch.tensor([row["label"] == "positive" for row in ROWS])
    return float((scores.argmax(1).bool() == truth).float().mean())
