"""The engine: each row of a mixed batch gets what it would get alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from orchestrator.artifact import PromptArtifact
from orchestrator.errors import Unreachable
from orchestrator.models.backbone import Backbone, CausalBackbone
from orchestrator.serving.engine import engine as engine_module
from orchestrator.serving.engine.engine import EngineLimits, Overloaded, ServingEngine
from orchestrator.serving.engine.generation import Sampling
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt

GREEDY = Sampling(max_tokens=12, temperature=0.0)
TEXTS = [
    "the quick brown fox",
    "win",
    "is this a great movie, or a terrible one, or what is it?",
    "",
]


class Recorder:
    """A recorder of the kind and size of each forward."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []

    def __call__(self, kind: str, rows: int) -> None:
        self.batches.append((kind, rows))


class Blocked(ServingEngine):
    """An engine whose thread waits for ``go``, so that requests pile up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.go = threading.Event()
        super().__init__(*args, **kwargs)

    def _loop(self) -> None:
        self.go.wait()
        super()._loop()


def close_to(probs: list[float], row: dict[str, Any]) -> bool:
    return probs == pytest.approx(list(row["probs"].values()), abs=1e-5)


def test_mixed_batch_equals_single_requests_and_offline(
    backbone: Backbone, spam: ServedPrompt, trec: ServedPrompt
) -> None:
    """Rows of two prompts get in one forward what each gets alone.

    The rows have different lengths and answers.
    """
    recorder = Recorder()
    engine = Blocked(backbone, observe=recorder)
    spam_ids = [spam.encode(text, 3) for text in TEXTS]
    trec_ids = [trec.encode({"question": text, "topic": "a place"}, 9) for text in TEXTS]

    async def together() -> list[Any]:
        tasks = [
            asyncio.create_task(engine.classify(spam, spam_ids)),
            asyncio.create_task(engine.classify(trec, trec_ids)),
        ]
        await asyncio.sleep(0)
        engine.go.set()
        return await asyncio.gather(*tasks)

    async def alone() -> list[Any]:
        return [
            [(await engine.classify(prompt, [ids]))[0] for ids in inputs]
            for prompt, inputs in ((spam, spam_ids), (trec, trec_ids))
        ]

    mixed, single = asyncio.run(together()), asyncio.run(alone())
    engine.close()
    assert recorder.batches[0] == ("classify", 8)
    assert {len(ids) for ids in trec.answers} != {1}
    for mixed_rows, single_rows in zip(mixed, single, strict=True):
        for a, b in zip(mixed_rows, single_rows, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    rows = OfflineModel(backbone, spam).classify(TEXTS)
    assert all(close_to(probs, row) for probs, row in zip(mixed[0], rows, strict=True))
    rows = OfflineModel(backbone, trec).classify(
        [{"question": text, "topic": "a place"} for text in TEXTS]
    )
    assert all(close_to(probs, row) for probs, row in zip(mixed[1], rows, strict=True))


def reference_greedy(
    backbone: Backbone, prompt: ServedPrompt, weights: torch.Tensor, text: str, tokens: int
) -> list[int]:
    """Generate with transformers on [prompt; input], unpadded."""
    ids = prompt.encode(text, tokens)
    embeds = torch.cat([weights.to(backbone.device), backbone.table[torch.tensor(ids)]])[None]
    made = backbone.model.generate(  # type: ignore[operator]
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=backbone.device),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=backbone.tokenizer.eos_token_id,
        pad_token_id=backbone.tokenizer.pad_token_id,
    )
    result: list[int] = made[0].tolist()
    return result


@pytest.mark.parametrize("prompt_once", [True, False])
def test_greedy_generation_equals_transformers(
    backbone: Backbone, make_artifact: Any, prompt_once: bool
) -> None:
    """A mixed batch generates what transformers generates for each row alone.

    That holds with and without the cached prompt.
    """
    backbone = CausalBackbone(backbone.model, backbone.tokenizer, backbone.info, prompt_once)
    folders = [
        make_artifact(f"p{size}", tokens=size, seed=size, template="{text}") for size in (3, 9)
    ]
    prompts = [load_prompt(backbone, folder, folder.name, 1) for folder in folders]
    weights = [torch.from_numpy(PromptArtifact.load(folder).weights) for folder in folders]
    engine = ServingEngine(backbone)

    async def ask() -> list[Any]:
        calls = [
            engine.complete(prompt, [prompt.encode(text, 12) for text in TEXTS], GREEDY)
            for prompt in prompts
        ]
        return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    engine.close()
    for prompt, vectors, completions in zip(prompts, weights, answers, strict=True):
        for text, completion in zip(TEXTS, completions, strict=True):
            expected = reference_greedy(backbone, prompt, vectors, text, 12)
            assert completion.tokens == len(expected)
            shown = [token for token in expected if token != backbone.tokenizer.eos_token_id]
            assert completion.text == backbone.tokenizer.decode(shown, skip_special_tokens=True)


def test_sampling_depends_on_the_seed_and_not_on_the_batch(
    engine: ServingEngine, story: ServedPrompt
) -> None:
    """The same seed gives the same text, alone or among other rows; another differs."""
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=7)
    inputs = [story.encode(text, 20) for text in TEXTS]

    async def ask() -> list[Any]:
        return [
            await engine.complete(story, inputs, sampling),
            await engine.complete(story, inputs[1:2], sampling),
            await engine.complete(story, inputs[1:2], Sampling(max_tokens=20, seed=8)),
        ]

    together, alone, other = asyncio.run(ask())
    assert together[1] == alone[0] != other[0]


@pytest.mark.parametrize("setting", [{"top_p": 5e-324}, {"temperature": 5e-324}])
def test_the_smallest_settings_choose_the_likeliest_token(
    engine: ServingEngine, story: ServedPrompt, setting: dict[str, float]
) -> None:
    """A top_p or temperature that float32 rounds to zero means greedy decoding."""
    ids = [story.encode("the quick", 12)]

    async def ask(sampling: Sampling) -> Any:
        return (await engine.complete(story, ids, sampling))[0].text

    drawn = asyncio.run(ask(Sampling(max_tokens=12, seed=3, **setting)))
    assert drawn == asyncio.run(ask(GREEDY))


def test_stop_strings_end_a_row(engine: ServingEngine, story: ServedPrompt) -> None:
    """A row ends at the first stop string, which is not part of its text."""
    ids = story.encode("the quick", 12)

    async def ask(sampling: Sampling) -> Any:
        return (await engine.complete(story, [ids], sampling))[0]

    free = asyncio.run(ask(GREEDY))
    stop = free.text[4:6]
    ended = asyncio.run(ask(Sampling(max_tokens=12, temperature=0.0, stop=("\0 never", stop))))
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert ended.tokens <= free.tokens


def test_end_token_ends_a_row(
    backbone: Backbone, engine: ServingEngine, story: ServedPrompt
) -> None:
    """A row ends at the end token, while the others continue."""

    async def ask() -> Any:
        inputs = [story.encode(f"{text} {number}", 60) for text in TEXTS for number in range(6)]
        return await engine.complete(
            story, inputs, Sampling(max_tokens=60, temperature=2.0, seed=1)
        )

    completions = asyncio.run(ask())
    assert {it.finish_reason for it in completions} == {"stop", "length"}
    assert all(it.tokens == 60 for it in completions if it.finish_reason == "length")


def test_full_line_is_refused_and_batches_keep_to_their_limits(
    backbone: Backbone, spam: ServedPrompt
) -> None:
    """A request beyond the waiting line is refused; batches keep to their allowed size."""
    recorder = Recorder()
    engine = Blocked(backbone, EngineLimits(max_rows=4, max_waiting=10), recorder)
    ids = spam.encode("hello", 1)

    async def ask() -> list[Any]:
        first = asyncio.create_task(engine.classify(spam, [ids] * 10))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await engine.classify(spam, [ids])
        engine.go.set()
        return await first

    assert len(asyncio.run(ask())) == 10
    engine.close()
    assert all(
        rows * max(1, len(spam.answers) if spam.longest_answer > 1 else 1) <= 4
        for _, rows in recorder.batches
    )


def test_abandoned_rows_are_not_computed(
    backbone: Backbone, story: ServedPrompt, spam: ServedPrompt
) -> None:
    """A cancelled request frees its rows, and the others are answered."""
    recorder = Recorder()
    engine = Blocked(backbone, observe=recorder)

    async def ask() -> Any:
        gone = asyncio.create_task(engine.complete(story, [story.encode("a", 9)], GREEDY))
        stays = asyncio.create_task(engine.classify(spam, [spam.encode("a", 9)]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        engine.go.set()
        return await stays

    assert len(asyncio.run(ask())) == 1
    engine.close()
    assert recorder.batches == [("classify", 1)]


def test_failing_batch_does_not_stop_the_engine(
    engine: ServingEngine, spam: ServedPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that raises answers its requests with the error; the next one is served."""
    ids = spam.encode("hello", 1)

    def explode(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    async def ask() -> Any:
        return await engine.classify(spam, [ids])

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "answer_probs", explode)
        with pytest.raises(RuntimeError, match="out of memory"):
            asyncio.run(ask())
    assert engine.alive
    assert len(asyncio.run(ask())) == 1


def test_closing_answers_who_still_waits(backbone: Backbone, spam: ServedPrompt) -> None:
    """Requests that wait on a closing engine get an error, and so do later ones."""
    engine = Blocked(backbone)

    async def ask() -> None:
        waiting = asyncio.create_task(engine.classify(spam, [spam.encode("a", 1)]))
        await asyncio.sleep(0)
        closing = threading.Thread(target=engine.close)
        closing.start()
        await asyncio.sleep(0.05)
        engine.go.set()
        with pytest.raises(Unreachable):
            await waiting
        closing.join()
        with pytest.raises(Unreachable):
            await engine.classify(spam, [spam.encode("a", 1)])

    asyncio.run(ask())
