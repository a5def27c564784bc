"""SmolLM2 tuned on a text task and on conversations, then asked through the openai client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from ray_processes import free_ports
from serve_process import LIMIT_S, ended, until_answered

from orchestrator.tuning.text_metrics import text_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]

TEST_ROWS = 200
MOST_TOKENS = 16  # of an answer
QUESTIONS = Path(__file__).parents[3] / "shared" / "data" / "trec6"
LABELS = ("abbreviation", "description", "entity", "human", "location", "number")
FOREIGN = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "ORCHESTRATOR_API_KEYS")


@dataclass
class Tuned:
    """A folder in which both jobs have run: their documents and the test rows."""

    folder: Path
    documents: dict[str, Any]
    rows: list[dict[str, Any]]


def environment() -> dict[str, str]:
    """Return the environment without a store, a cluster or keys; Ray's tests set some of them."""
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def question_rows(split: str, count: int) -> list[dict[str, Any]]:
    """Return TREC's first rows, each with a conversation of two questions and two answers.

    The earlier question is the row before.
    """
    lines = (QUESTIONS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: count + 1]]
    return [
        {
            "text": row["text"],
            "label": row["label_name"],
            "messages": [
                {"role": "system", "content": "Say what a question asks for."},
                *turns(earlier),
                *turns(row),
            ],
        }
        for earlier, row in pairwise(rows)
    ]


def turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a question and its answer as two turns."""
    return [
        {"role": "user", "content": row["text"]},
        {"role": "assistant", "content": f"It asks for: {row['label_name']}."},
    ]


def job(name: str, data: dict[str, Any], metric: str, steps: int) -> dict[str, Any]:
    """Return a job of one trial; float32, so that batches of other sizes decode the same texts."""
    return {
        "name": name,
        "base_model": {"id": "builtin:smollm2-135m", "dtype": "float32"},
        "data": data,
        "search": {
            "space": {"init": "sample_vocab", "num_virtual_tokens": 10, "learning_rate": 0.3},
            "trials": 1,
            "searcher": "random",
            "scheduler": "fifo",
            "metric": metric,
            "few_shot": 0,
        },
        "train": {"steps": steps, "batch_size": 4, "evaluate_every": steps},
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Tuned:
    """Run both jobs as a user would, one after the other in one folder."""
    if not QUESTIONS.is_dir():
        pytest.skip(f"needs the data set {QUESTIONS.name}")
    folder = tmp_path_factory.mktemp("chat")
    known = question_rows("train", 330)
    splits = {
        "train": known[:300],
        "validation": known[300:],
        "test": question_rows("test", TEST_ROWS),
    }
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    path = {split: f"{split}.jsonl" for split in splits}
    text_task = {
        "path": path, "template": "{text}\nWhat does the question ask for?", "target": "label",
        "verbalizer": {label: label for label in LABELS}, "chat": {"system": "Answer in a word."},
        "max_input_tokens": 128,
    }  # fmt: skip
    conversations = {
        "path": path, "messages": "messages", "max_input_tokens": 256,
        "max_target_tokens": MOST_TOKENS,
    }  # fmt: skip
    jobs = {
        "questions": job("questions", text_task, "accuracy", 60),
        "talks": job("talks", conversations, "rouge_l", 15),
    }
    documents = {}
    for name, spec in jobs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
        argv = [sys.executable, "-m", "orchestrator", "run", f"{name}.yaml", "--json"]
        done = subprocess.run(
            argv, cwd=folder, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        documents[name] = json.loads(done.stdout)
    return Tuned(folder, documents, splits["test"])


@pytest.fixture(scope="module")
def client(tuned: Tuned) -> Iterator[openai.OpenAI]:
    """Serve both prompts in a process of its own."""
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", "orchestrator", "serve", "--cpus", "1", "--port", str(port)]
    process = subprocess.Popen(
        argv, cwd=tuned.folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        until_answered(port, process)
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=LIMIT_S) as client:
            yield client
    finally:
        process.terminate()
        ended(process)


def answers(
    client: openai.OpenAI, model: str, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[str]:
    """Return the greedy answer to each conversation."""
    texts = []
    for messages in conversations:
        answer = client.chat.completions.create(
            model=model, messages=list(messages), temperature=0, max_tokens=MOST_TOKENS  # type: ignore[arg-type]
        )  # fmt: skip
        texts.append(answer.choices[0].message.content or "")
    return texts


def test_chat_answers_have_the_accuracy_that_the_search_measured(
    tuned: Tuned, client: openai.OpenAI
) -> None:
    """A text task: 200 questions through /v1/chat/completions, each as the user's only message.

    Greedy decoding gives the target exactly as often as the search's exact_match. Its accuracy is
    that of the likeliest label, so a row can only differ where the greedy text is no label.
    """
    conversations = [[{"role": "user", "content": row["text"]}] for row in tuned.rows]
    texts = answers(client, "questions", conversations)
    right = [text == row["label"] for text, row in zip(texts, tuned.rows, strict=True)]
    document = tuned.documents["questions"]
    metrics = document["best"]["metrics"]["test"]
    assert sum(right) / TEST_ROWS == pytest.approx(metrics["exact_match"], abs=1e-9)
    no_labels = sum(text not in LABELS for text in texts)
    assert abs(sum(right) / TEST_ROWS - metrics["accuracy"]) <= no_labels / TEST_ROWS
    assert metrics["accuracy"] > document["baselines"]["zero_shot"]["test"]["accuracy"]


def test_conversations_have_the_rouge_l_that_the_search_measured(
    tuned: Tuned, client: openai.OpenAI
) -> None:
    """Conversations with a system message and an earlier answer, asked without the last answer."""
    texts = answers(client, "talks", [row["messages"][:-1] for row in tuned.rows])
    references = [[row["messages"][-1]["content"]] for row in tuned.rows]
    metrics = tuned.documents["talks"]["best"]["metrics"]["test"]
    found = text_metrics(texts, references)
    assert found["rouge_l"] == pytest.approx(metrics["rouge_l"], abs=1e-9)
    exact = sum(text == reference for text, (reference,) in zip(texts, references, strict=True))
    assert exact / TEST_ROWS == pytest.approx(metrics["exact_match"], abs=1e-9)
