"""Jobs for benchmarks of whole searches: real data with a small model, or random data and model."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measure import Skipped
from tests.benchmarks.subjects import SIZES, make_model, make_tokenizer

SHARED = Path(os.environ.get("BENCH_SHARED", Path(__file__).parents[3] / "shared"))
"""Folder with ``data`` and ``models``; see the README."""

ONE_TOKEN = {
    "abbreviation": " letter",
    "description": " why",
    "entity": " thing",
    "human": " person",
    "location": " place",
    "number": " number",
}
"""Answers of one token for the classes of trec6, the cheapest to evaluate for all sides."""


def shared(*parts: str) -> Path:
    """Return a file or folder of the shared data and models.

    Raises Skipped if it does not exist.
    """
    path = SHARED.joinpath(*parts)
    if not path.exists():
        raise Skipped(f"{path} is not there; BENCH_SHARED names the folder with data/ and models/")
    return path


def trec6(folder: Path, validation: int = 100, test: int = 100, copies: int = 1) -> dict[str, Any]:
    """Return a job that classifies questions with the story model of three million weights.

    The validation rows are set aside from train. ``copies``: see ``copied_words``.
    """
    rows = [
        json.loads(line) for line in shared("data", "trec6", "train.jsonl").read_text().splitlines()
    ]
    random.Random(0).shuffle(rows)
    files = {"validation": rows[:300], "train": rows[300:]}
    paths = {"test": str(shared("data", "trec6", "test.jsonl"))}
    for split, part in files.items():
        paths[split] = _write(folder / f"{split}.jsonl", part)
    data = {
        "template": "{text}\nThe question asks for:",
        "verbalizer": ONE_TOKEN,
        "max_input_tokens": 64,
    }
    job = _story_job("trec6", {**data, "path": paths}, validation, test)
    return (
        job
        if copies == 1
        else {**job, "base_model": {"id": str(copied_words(folder / "model", copies))}}
    )


def copied_words(folder: Path, copies: int) -> Path:
    """Save the story model with ``copies`` copies of each word of its vocabulary.

    The model's predictions stay the same: the copies of a word share its probability, and no text
    contains a copy. The cost is that of the larger vocabulary; most models' vocabularies are ten
    times as large as this model's.
    """
    from transformers import AutoModelForCausalLM

    source = shared("models", "stories3M")
    model = AutoModelForCausalLM.from_pretrained(source)
    words = model.get_input_embeddings().weight.detach()
    model.resize_token_embeddings(copies * len(words), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(words.repeat(copies, 1))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def sst2(folder: Path, validation: int = 300, test: int = 500) -> dict[str, Any]:
    """Return a job that classifies film reviews as negative or positive, with the story model."""
    words = {"negative": " bad", "positive": " good"}
    data = {"template": "{text}\nThe film is", "verbalizer": words, "max_input_tokens": 64}
    return _story_job("sst2", {**data, "path": _splits("sst2")}, validation, test)


def sms_spam(folder: Path, validation: int = 200, test: int = 200) -> dict[str, Any]:
    """Return a job that classifies messages as spam or ham, with the story model."""
    words = {"ham": " ham", "spam": " spam"}
    data = {"template": "{text}\nSpam or not?", "verbalizer": words, "max_input_tokens": 128}
    return _story_job("sms-spam", {**data, "path": _splits("sms_spam")}, validation, test)


def _splits(name: str) -> dict[str, str]:
    return {
        split: str(shared("data", name, f"{split}.jsonl"))
        for split in ("train", "validation", "test")
    }


def _story_job(name: str, data: dict[str, Any], validation: int, test: int) -> dict[str, Any]:
    limit = {"validation": validation, "test": test}
    return {
        "name": name,
        "base_model": {"id": str(shared("models", "stories3M"))},
        "data": {**data, "target": "label_name", "limit": limit},
    }


def random_model(folder: Path, size: str = "toy", rows: int = 200) -> dict[str, Any]:
    """Return a job with a random model of words w1, w2, ... and random rows.

    There is nothing to learn and hardly anything to compute.
    """
    model = folder / f"model-{size}"
    torch.manual_seed(0)
    made = SIZES[size]
    make_model(made, torch.device("cpu")).save_pretrained(model)
    make_tokenizer(made.vocabulary).save_pretrained(model)
    choose = random.Random(0)
    paths = {}
    for split, count in (("train", rows), ("validation", 16), ("test", 16)):
        texts = [
            " ".join(f"w{choose.randrange(3, made.vocabulary)}" for _ in range(8))
            for _ in range(count)
        ]
        found = [{"text": text, "label": choose.choice(["one", "two"])} for text in texts]
        paths[split] = _write(folder / f"{split}.jsonl", found)
    return {
        "name": "random",
        "base_model": {"id": str(model)},
        "data": {
            "path": paths,
            "template": "{text}",
            "target": "label",
            "verbalizer": {"one": " w1", "two": " w2"},
            "max_input_tokens": 16,
        },
    }


def _write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)
