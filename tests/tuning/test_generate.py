"""Generated texts and their metrics do not depend on how rows and prompts are batched."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    encoder_for,
    random_ids,
    random_prompts,
    small_task,
    tiny_backbone,
    tiny_tokenizer,
)

from orchestrator.data.encoding import Encoded
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import SearchSpec, TrainSpec
from orchestrator.models.decoding import decode, start
from orchestrator.tuning import generate as generate_module
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine, Task
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding, generate, generated_metrics
from orchestrator.tuning.reports import EvaluationJob, Report
from orchestrator.tuning.text_metrics import text_metrics

INPUTS = random_ids([4, 9, 1, 6, 12, 2], seed=3)
GREEDY, BEAMS = Decoding(6), Decoding(5, num_beams=3)


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("prompt_once", [True, False], ids=["once", "concatenated"])
@pytest.mark.parametrize("limit", [1, 200, 100_000])
def test_texts_are_those_of_rows_alone(
    limit: int, prompt_once: bool, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt generates a text for every row, in the split's order, with any batch size."""
    monkeypatch.setattr(generate_module, "MAX_TOKENS", limit)
    backbone, encoder = tiny_backbone(prompt_once=prompt_once), encoder_for(None)
    prompts = random_prompts(backbone, [4, 1, 7], seed=3)
    with torch.no_grad():
        got = generate(backbone, backbone.prepare(prompts), INPUTS, encoder, decoding)
        for prompt, texts in zip(prompts, got, strict=True):
            prepared = backbone.prepare([prompt])
            for ids, text in zip(INPUTS, texts, strict=True):
                state = start(backbone, prepared, [ids], [0])
                (made,) = decode(state, encoder.end_id, decoding.max_tokens, decoding.num_beams)
                assert text == tiny_tokenizer().decode(made).strip()
    assert len({text for texts in got for text in texts}) > len(INPUTS)


def test_the_model_without_a_prompt_is_one_entry() -> None:
    """Without prompts there is one list of texts, which are the bare model's."""
    backbone, encoder = tiny_backbone(), encoder_for(None)
    (texts,) = generate(backbone, None, INPUTS, encoder, GREEDY)
    made = decode(
        start(backbone, None, INPUTS, [0] * len(INPUTS)), encoder.end_id, GREEDY.max_tokens
    )
    assert texts == [tiny_tokenizer().decode(ids).strip() for ids in made]


class Says:
    """A generation state that gives fixed tokens, whatever its input."""

    def __init__(self, ids: list[int], rows: int, at: int = 0) -> None:
        self.ids, self.rows, self.at = ids, rows, at

    @property
    def logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            torch.tensor([self.ids[self.at]] * self.rows), len(tiny_tokenizer())
        ).float()

    def select(self, rows: torch.Tensor) -> Says:
        return Says(self.ids, len(rows), self.at)

    def extend(self, ids: torch.Tensor) -> Says:
        return Says(self.ids, self.rows, self.at + 1)


def test_special_tokens_and_outer_spaces_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Special tokens and spaces around the text are removed; spaces inside stay."""
    tokenizer = tiny_tokenizer()
    ids = [
        *tokenizer(" a  good ")["input_ids"],
        tokenizer.pad_token_id,
        *tokenizer(" .\n")["input_ids"],
    ]
    monkeypatch.setattr(
        generate_module, "start", lambda *_: Says([*ids, tokenizer.eos_token_id], 1)
    )
    backbone: Any = SimpleNamespace()
    assert generate(backbone, None, [[5]], encoder_for(None), Decoding(99)) == [["a  good  ."]]


def split_with_references(texts: list[str]) -> Encoded:
    """Return a split with the given texts as references; every other row has a second one."""
    encoded = Encoded(INPUTS, [[3, 4, 0]] * len(INPUTS), [-1] * len(INPUTS))
    return replace(
        encoded,
        references=[[text] if n % 2 else ["nothing like it", text] for n, text in enumerate(texts)],
    )


def test_metrics_are_of_the_texts_against_the_references() -> None:
    """evaluate adds each prompt's text metrics to the others; without a Decoding it adds none."""
    backbone, encoder = tiny_backbone(), encoder_for(None)
    prompts = random_prompts(backbone, [4, 2], seed=3)
    with torch.no_grad():
        prepared = backbone.prepare(prompts)
        texts = generate(backbone, prepared, INPUTS, encoder, BEAMS)
        split = split_with_references(texts[0])
        got = evaluate(backbone, prompts, split, encoder, BEAMS)
        plain = evaluate(backbone, prompts, split, encoder)
        of_texts = generated_metrics(backbone, prepared, split, encoder, BEAMS)
    assert [one["exact_text"] for one in got] == [1, 0]
    assert got == [
        {**one, **text_metrics(made, split.references)}
        for one, made in zip(plain, texts, strict=True)
    ]
    assert of_texts == [text_metrics(made, split.references) for made in texts]
    assert set(plain[0]) == {"exact_match", "loss"}


def one_round(task: Task, metric: str) -> tuple[Engine, Report]:
    """Run one trial of two steps; return its engine and report."""
    backbone = tiny_backbone(dtype=torch.float32)
    engine = Engine(
        backbone, task, TrainSpec(steps=2, evaluate_every=2), SearchSpec(metric=metric), capacity=2
    )
    engine.seat("a", TrialSpec("random", None, num_virtual_tokens=3, learning_rate=0.1, seed=0))
    (report,) = engine.round()
    return engine, report


def test_the_engine_ranks_trials_by_a_text_metric() -> None:
    """Reports, baselines and saved prompts have the text metrics; the score is the search's."""
    task = small_task(None, train=8, validation=4)
    engine, report = one_round(task, "loss")
    assert set(report.metrics) == {"exact_match", "loss"}
    prepared = engine.backbone.prepare([Checkpoint.from_bytes(report.checkpoint).best()["prompt"]])
    (said,) = generate(
        engine.backbone, prepared, task.splits["validation"].inputs, task.encoder, GREEDY
    )
    references = {"validation": [[said[0]], [said[1]], ["no"], ["no"]], "test": [["no"]] * 5}
    for split, texts in references.items():
        task.splits[split] = replace(task.splits[split], references=texts)
    task.decoding = GREEDY
    engine, report = one_round(task, "f1")
    assert report.score == report.metrics["f1"] == report.metrics["exact_text"] == 0.5
    assert set(engine.evaluate(EvaluationJob("test"))) == set(report.metrics)
    saved = engine.evaluate(EvaluationJob("validation", checkpoint=report.checkpoint))
    assert saved == pytest.approx(report.metrics)
