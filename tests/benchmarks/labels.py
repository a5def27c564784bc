"""Evaluation with many labels of several tokens: as a tree of their tokens, and one by one.

The rows are questions that name one of the labels, and several trials are evaluated together. Peak
memory is measured in a process of its own for each side, also as
``python -m tests.benchmarks.labels JSON``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.data.template import Template, Verbalizer
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, default_device, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.tuning.cpu_threads import Threads
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.step import packed_gradients
from tests.benchmarks.jobs import shared
from tests.benchmarks.measure import Comparison, Line, in_fresh_process, seconds
from tests.benchmarks.memory import MEGABYTE, forget_peak, peak

TOPICS = (
    "card", "gift card", "phone", "new phone", "money", "letter", "love letter", "ticket",
    "train ticket", "school bag", "key of the house", "birthday gift", "boat", "toy boat", "book",
)  # fmt: skip
PROBLEMS = (
    "lost", "broken", "too late", "not here", "very old", "wrong color", "too small", "new name",
    "who paid", "how long",
)  # fmt: skip
SIDES = ("tree", "one by one")


@dataclass(frozen=True)
class Setting:
    """Numbers of labels, rows, trials, virtual tokens, and steps after which trials are tuned."""

    labels: int = 77
    rows: int = 300
    trials: int = 4
    prompt: int = 20
    steps: int = 60
    seed: int = 0


SETTINGS = {
    "real": Setting(),
    "small": Setting(rows=24, steps=5),
    "many": Setting(labels=150, rows=24, steps=5),
}


@dataclass(frozen=True)
class Subject:
    """A model, rows and trials to evaluate."""

    backbone: Backbone
    encoder: Encoder
    split: Encoded
    prompts: list[Tensor]
    threads: Threads

    def evaluate(self, side: str, metric: str | None = None) -> list[dict[str, float]]:
        self.backbone.answers_as_tree = side == "tree"
        return evaluate(
            self.backbone, self.prompts, self.split, self.encoder, threads=self.threads,
            metric=metric,
        )  # fmt: skip


def lines(setting: Setting, pairs: int, only: str = "") -> list[Line]:
    """Return a line for untuned trials, one for tuned trials, and one with all probabilities."""
    subject = make_subject(setting)
    found = []
    for name, metric in (("untuned", None), ("tuned", None), ("tuned, all probabilities", "ece")):
        if name == "tuned":
            tune(subject, setting)
        if only in name:
            found.append(_line(f"{setting.labels} labels, {name}", subject, metric, pairs))
    memory = {
        f"{side}, MB": in_fresh_process(
            "tests.benchmarks.labels", {**asdict(setting), "side": side}
        )
        for side in SIDES
    }
    shown = {name: figures["above"] for name, figures in memory.items()}
    return [*found, Line(f"{setting.labels} labels, memory", dict(shown))]


def _line(name: str, subject: Subject, metric: str | None, pairs: int) -> Line:
    """Measure both sides in turn, after a run of the tree that is not counted.

    The other side takes minutes, and a first run of it would not be slower than the next.
    """
    accuracies = dict.fromkeys(SIDES, 0.0)
    subject.evaluate("tree", metric)
    comparison = Comparison(name)

    def run(side: str) -> None:
        metrics = subject.evaluate(side, metric)
        accuracies[side] = sum(each["accuracy"] for each in metrics) / len(metrics)

    for _ in range(pairs):
        comparison.ours.append(seconds(partial(run, "tree")))
        comparison.peer.append(seconds(partial(run, "one by one")))
    return comparison.line(**{f"accuracy, {side}": value for side, value in accuracies.items()})


def make_subject(setting: Setting) -> Subject:
    """Load the model and make rows and untuned trials. Raises Skipped without the model."""
    folder = shared("models", "stories3M")
    device = default_device()
    backbone = load_backbone(resolve_model(BaseModelSpec(id=str(folder))), device)
    labels = label_texts(setting)
    verbalizer = Verbalizer(labels, tuple(f" {label}" for label in labels))
    encoder = Encoder(
        backbone.tokenizer, Template("{text}\nThe question is about:"), verbalizer,
        max_input_tokens=64, max_target_tokens=16,
    )  # fmt: skip
    split = encoder.encode(questions(setting, labels), "label")
    threads = Threads.of(torch.get_num_threads(), backbone.model, device)
    return Subject(backbone, encoder, split, untuned(backbone, encoder, setting), threads)


def label_texts(setting: Setting) -> tuple[str, ...]:
    """Return different labels, of two to seven tokens of the model, in random order."""
    texts = [f"{topic} {problem}" for topic, problem in product(TOPICS, PROBLEMS)]
    random.Random(setting.seed).shuffle(texts)
    return tuple(texts[: setting.labels])


def questions(setting: Setting, labels: Sequence[str]) -> list[dict[str, str]]:
    """Return questions of trec6, each with the words of its label mixed in."""
    file = shared("data", "trec6", "test.jsonl")
    choose = random.Random(setting.seed)
    rows = []
    for line in file.read_text().splitlines()[: setting.rows]:
        label = choose.choice(labels)
        words = label.split()
        choose.shuffle(words)
        text = f"{json.loads(line)['text']} Please help me: {' '.join(words)}."
        rows.append({"text": text, "label": label})
    return rows


def untuned(backbone: Backbone, encoder: Encoder, setting: Setting) -> list[Tensor]:
    """Return trials that start from the embeddings of the labels' tokens."""
    ids = sorted({token for answer in encoder.answers for token in answer})
    choose = random.Random(setting.seed)
    drawn = [choose.choices(ids, k=setting.prompt) for _ in range(setting.trials)]
    with torch.no_grad():
        return [
            backbone.embed(torch.tensor(tokens, device=backbone.device)).float() for tokens in drawn
        ]


def tune(subject: Subject, setting: Setting) -> None:
    """Tune the trials for some steps, so that they favour labels."""
    prompts = [prompt.requires_grad_() for prompt in subject.prompts]
    optimizer = torch.optim.Adam(prompts, lr=0.02)
    draw = random.Random(setting.seed)
    for _ in range(setting.steps):
        optimizer.zero_grad()
        rows = [draw.sample(range(setting.rows), min(16, setting.rows)) for _ in prompts]
        packed_gradients(subject.backbone, prompts, rows, subject.split)
        optimizer.step()


def measure_here(side: str, setting: Setting) -> dict[str, float]:
    """Return the megabytes that an evaluation takes beyond the memory held before it."""
    subject = make_subject(setting)
    before = forget_peak(subject.backbone.device)
    subject.evaluate(side)
    return {"above": (peak(subject.backbone.device) - before) / MEGABYTE}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    side = arguments.pop("side")
    print(json.dumps(measure_here(side, Setting(**arguments))))
