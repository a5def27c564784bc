"""Batching by iteration: rows that enter and leave change nothing for the others.

Also streams, stop strings and log-probabilities.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import backbone_of, tiny_tokenizer
from test_serving_engine import Blocked, Recorder
from test_serving_methods import GENERATING, TEXTS, encoded, served  # noqa: F401

from orchestrator.models.backbone import Backbone, CausalState
from orchestrator.serving.engine.detokenize import WINDOW, RowText
from orchestrator.serving.engine.engine import EngineLimits, ServingEngine
from orchestrator.serving.engine.generation import Completion, Delta, GenerationRow, Sampling
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import ServedPrompt

GREEDY = Sampling(max_tokens=10, temperature=0.0)


class Held(Recorder):
    """A recorder that stops the engine's thread at some generation step, until ``go`` is set."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.go, self.reached, self._steps = threading.Event(), threading.Event(), steps

    def __call__(self, kind: str, rows: int) -> None:
        super().__call__(kind, rows)
        if (
            kind == "generate"
            and sum(kind == "generate" for kind, _ in self.batches) == self._steps
        ):
            self.reached.set()
            self.go.wait(60)


def ask_by_and_by(
    backbone: Backbone,
    first: Callable[[ServingEngine], Any],
    then: Callable[[ServingEngine], list[Any]],
    limits: Any = None,
) -> tuple[Any, list[Any], list[tuple[str, int]]]:
    """Send a request, and others when it has three tokens.

    Returns the first request's answer, the others' answers, and the forwards.
    """
    held = Held(4)
    engine = ServingEngine(backbone, limits, held)

    async def run() -> tuple[Any, list[Any]]:
        running = asyncio.create_task(first(engine))
        await asyncio.to_thread(held.reached.wait, 60)
        others = [asyncio.create_task(one) for one in then(engine)]
        await asyncio.sleep(0)
        held.go.set()
        return await running, await asyncio.gather(*others)

    begun, others = asyncio.run(run())
    engine.close()
    return begun, others, held.batches


@pytest.mark.parametrize("family", GENERATING)
def test_rows_enter_a_running_generation(family: str, served: Any) -> None:  # noqa: F811
    """Rows that enter while others generate get what they get alone.

    They change nothing for the running rows. The rows are of all methods.
    """
    backbone, prompts = backbone_of(family), served(family)
    early, late = list(prompts.values())[:2], list(prompts.values())
    long = Sampling(max_tokens=14, temperature=0.0)

    async def first(engine: ServingEngine) -> list[Any]:
        return await asyncio.gather(
            *(engine.complete(prompt, encoded(prompt), long) for prompt in early)
        )

    # Both requests must wait before the engine sees either; else the second would enter later.
    begun, others, batches = ask_by_and_by(
        backbone,
        first,
        lambda engine: [engine.complete(prompt, encoded(prompt), GREEDY) for prompt in late],
    )
    for prompt, completions in zip(early, begun, strict=True):
        assert completions == OfflineModel(backbone, prompt).complete(TEXTS, long)
    for prompt, completions in zip(late, others, strict=True):
        assert completions == OfflineModel(backbone, prompt).complete(TEXTS, GREEDY)
    entered = [place for place, (kind, _) in enumerate(batches) if kind == "prefill"]
    assert entered[-1] > 3  # while the first ones were running


def test_a_waiting_row_takes_the_place_of_a_finished_one(
    backbone: Backbone, story: ServedPrompt
) -> None:
    """With room for two rows, the third enters as soon as one row is done."""
    recorder = Recorder()
    engine = Blocked(backbone, EngineLimits(max_rows=2), recorder)
    ids = story.encode("the quick", 40)
    wanted = [3, 30, 5]

    async def run() -> list[Any]:
        asked = [
            engine.complete(story, [ids], Sampling(max_tokens=tokens, temperature=0.0))
            for tokens in wanted
        ]
        tasks = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)
        engine.go.set()
        return await asyncio.gather(*tasks)

    answers = [one for (one,) in asyncio.run(run())]
    engine.close()
    assert [one.tokens for one in answers] == wanted
    assert all(answers[1].text.startswith(one.text) for one in answers)
    steps = [rows for kind, rows in recorder.batches if kind == "generate"]
    assert (
        steps == [2] * 8 + [1] * 22
    )  # rows of 3 and then 5 tokens beside the long row, then it alone


def test_a_batch_stays_as_narrow_as_its_rows(backbone: Backbone) -> None:
    """Columns of rows that left, and padding, are dropped when other rows enter."""
    states = []
    device = backbone.device
    for lengths, steps in (((3, 9), 4), ((2,), 0)):
        inputs = [[5 + place] * length for place, length in enumerate(lengths)]
        state: Any = backbone.start(None, inputs, [0] * len(lengths))
        for _ in range(steps):
            ids = torch.full((len(lengths), 1), 7, device=device)
            state = backbone.extend(state, ids, torch.ones_like(ids, dtype=torch.bool))[1]
        states.append(state)
    short = CausalState.join([states[0].select(torch.tensor([0], device=device)), states[1]])
    assert short.mask.tolist() == [[True] * 7, [False] * 5 + [True] * 2]
    alone = backbone.extend(
        states[1], torch.tensor([[9]], device=device), torch.tensor([[True]], device=device)
    )[0]
    ids = torch.full((2, 1), 9, device=device)
    both = backbone.extend(short, ids, torch.ones_like(ids, dtype=torch.bool))[0]
    torch.testing.assert_close(both[1], alone[0], rtol=1e-5, atol=1e-5)


def test_who_hangs_up_frees_the_row(backbone: Backbone, story: ServedPrompt) -> None:
    """A row whose client hung up is in no further step, and the others continue."""

    held = Held(4)
    engine = ServingEngine(backbone, None, held)

    async def leave() -> None:
        told = engine.stream(
            story, [story.encode("win", 60)], Sampling(max_tokens=60, temperature=0.0)
        )
        await anext(told)
        await asyncio.to_thread(held.reached.wait, 60)
        await told.aclose()  # type: ignore[attr-defined]

    async def run() -> Any:
        stays = asyncio.create_task(
            engine.complete(story, [story.encode("the", 20)], Sampling(20, 0.0))
        )
        await leave()
        held.go.set()
        return await stays

    (completion,) = asyncio.run(run())
    engine.close()
    assert completion.tokens == 20
    steps = [rows for kind, rows in held.batches if kind == "generate"]
    assert steps[3] == 2 and set(steps[4:]) == {1}


def gather(engine: ServingEngine, prompt: ServedPrompt, sampling: Sampling) -> list[list[Delta]]:
    """Stream all texts, and return the deltas of each row."""
    told: list[list[Delta]] = [[] for _ in TEXTS]

    async def run() -> None:
        async for row, delta in engine.stream(
            prompt, [prompt.encode(text, 30) for text in TEXTS], sampling
        ):
            told[row].append(delta)

    asyncio.run(run())
    return told


@pytest.mark.parametrize(
    "sampling", [Sampling(30, 0.0), Sampling(30, 1.5, seed=3), Sampling(30, 0.0, logprobs=2)]
)
def test_streams_add_up_to_the_completion(
    sampling: Sampling, backbone: Backbone, engine: ServingEngine, story: ServedPrompt
) -> None:
    """Text, tokens and log-probabilities of a stream are those of the completion.

    Only the last delta has a finish reason.
    """
    for deltas, whole in zip(
        gather(engine, story, sampling),
        OfflineModel(backbone, story).complete(TEXTS, sampling),
        strict=True,
    ):
        assert len(deltas) > 1
        assert "".join(delta.text for delta in deltas) == whole.text
        assert sum(delta.tokens for delta in deltas) == whole.tokens
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [
            whole.finish_reason
        ]
        told = [one for delta in deltas for one in delta.logprobs]
        assert [(one.text, one.offset) for one in told] == [
            (one.text, one.offset) for one in whole.logprobs
        ]
        assert [one.logprob for one in told] == pytest.approx(
            [one.logprob for one in whole.logprobs], abs=1e-4
        )


def test_a_stop_string_is_never_told(engine: ServingEngine, story: ServedPrompt) -> None:
    """Text that may become a stop string is held back, and sent when it can't any more.

    That includes stop strings that span tokens.
    """
    free = gather(engine, story, Sampling(30, 0.0))
    texts = ["".join(delta.text for delta in deltas) for deltas in free]
    stop = texts[0][9:14]
    for deltas, text in zip(
        gather(engine, story, Sampling(30, 0.0, stop=(stop, "\0" * 5))), texts, strict=True
    ):
        assert "".join(delta.text for delta in deltas) == text.split(stop)[0]


def test_logprobs_are_the_model_s(backbone: Backbone, story: ServedPrompt) -> None:
    """Log-probabilities are those of the model's logits; greedy takes the likeliest token."""
    (whole,) = OfflineModel(backbone, story).complete(TEXTS[:1], Sampling(5, 0.0, logprobs=3))
    ids = story.encode(TEXTS[0], 5)
    state: Any = backbone.start(story.prepared, [ids], [0])
    scores = state.logits[0].log_softmax(-1)
    best = scores.topk(3)
    first = whole.logprobs[0]
    assert first.logprob == pytest.approx(float(best.values[0]), abs=1e-5)
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [text for text, _ in first.top] == [
        backbone.tokenizer.decode([one]) for one in best.indices.tolist()
    ]
    assert first.text == first.top[0][0] and len(whole.logprobs) == whole.tokens


def test_a_row_that_fails_fails_alone(
    backbone: Backbone, story: ServedPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error with one row's token fails only that request; other rows finish."""
    take = GenerationRow.take

    def choosy(row: GenerationRow, token: int) -> None:
        if row.sampling.seed == 13:
            raise RuntimeError("no luck")
        take(row, token)

    monkeypatch.setattr(GenerationRow, "take", choosy)
    engine = Blocked(backbone)
    ids = story.encode("a", 5)

    async def run() -> list[Any]:
        asked = [
            engine.complete(story, [ids], Sampling(5, 1.0, seed=seed)) for seed in (12, 13, 14)
        ]
        tasks = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)
        engine.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    good, bad, fine = asyncio.run(run())
    engine.close()
    assert isinstance(bad, RuntimeError)
    assert all(isinstance(one[0], Completion) and one[0].tokens <= 5 for one in (good, fine))


@pytest.mark.parametrize("seed", range(4))
def test_text_that_grows_is_the_text_of_all_tokens(seed: int) -> None:
    """Decoding by windows equals decoding everything, also for characters cut in pieces."""
    tokenizer, choose = tiny_tokenizer(), random.Random(seed)
    letters = "aé€𝄞 ü字the fox . "
    written = "".join(choose.choices(letters, k=120))
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3 * WINDOW
    row, told = RowText(tokenizer, tokenizer("so it is")["input_ids"]), ""
    for place, token in enumerate(ids, 1):
        row.add(token)
        assert row.text == tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False)
        shown = row.shown(())
        assert shown.startswith(told) and "\ufffd" not in shown
        told = shown
    assert row.text == written


def test_what_is_shown_waits_for_stop_strings() -> None:
    """The longest end of the text that could begin a stop string is held back."""
    tokenizer = tiny_tokenizer()
    row = RowText(tokenizer, [])
    for token in tokenizer("a number of lazy dogs", add_special_tokens=False)["input_ids"]:
        row.add(token)
    assert row.shown(["dogs and cats"]) == "a number of lazy "
    assert row.shown(["s!", "lazy dogs, lazy cats"]) == "a number of "
    assert row.shown(["cats"]) == row.shown(()) == "a number of lazy dogs"
