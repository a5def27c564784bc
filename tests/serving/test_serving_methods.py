"""Served answers of every prompt method on every kind of model.

Mixed batches, single rows and the offline model agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from models import MASKED, SEQ2SEQ, backbone_of, load, tiny_model, tokenizer_of
from test_artifact import manifest
from test_serving_engine import Blocked, Recorder
from test_serving_routes import Client, error_of

from orchestrator.artifact import BaseModelRecord, PromptArtifact, VerbalizerEntry
from orchestrator.data.encoding import Encoded, Encoder
from orchestrator.errors import BadInput
from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import PROMPT_ONCE_FAMILIES, Backbone
from orchestrator.models.placeholders import placed, text_ids
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.engine.generation import GenerationRow, Sampling
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import (
    ContextExceeded,
    ServedPrompt,
    load_prompt,
    prompt_tensors,
)
from orchestrator.serving.prompts.store import PromptStore
from orchestrator.tuning.evaluate import evaluate
from orchestrator.tuning.generate import Decoding, generate
from orchestrator.tuning.prompts import InitContext, Method, make_prompt

FAMILIES = ["llama", "gpt2", "mistral", "gemma3_text", "t5", "bart", "bert"]
GENERATING = [family for family in FAMILIES if family not in MASKED]
METHODS = {
    "prompt tuning": Method("prompt_tuning"),
    "prompt tuning inside": Method("prompt_tuning", inside=True),
    "prefix": Method("prefix_tuning"),
    "p-tuning": Method("p_tuning", "lstm"),
}
NAMES = [*METHODS, "prefix, longer"]
FRONT, INSIDE = "{text}\nspam?", "{*}a {text} {*}{_} spam?{*}"
VERBALIZER = {0: " quick fox", 1: " lazy dog"}
UNEVEN = {0: " quick", 1: " yes no"}
TEXTS = ["the quick brown fox", "win", "is this a great movie, or a terrible one?", ""]
GREEDY = Sampling(max_tokens=8, temperature=0.0)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_generating_family = pytest.mark.parametrize("family", GENERATING)


def save_prompt(
    folder: Path,
    backbone: Backbone,
    method: Method = METHODS["prompt tuning"],
    tokens: int = 4,
    verbalizer: dict[int, str] | None = VERBALIZER,
    seed: int = 0,
) -> Path:
    """Save an artifact of the method.

    Its parameters are moved off their start, so that nothing is zero by chance.
    """
    prompt = make_prompt(
        method, TrialSpec("random", None, tokens, 0.1, seed), InitContext.of(backbone, [[5], [6]])
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in prompt.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tensors = {name: tensor.detach().float().numpy() for name, tensor in prompt().named().items()}
    record = {name: getattr(backbone.info, name) for name in BaseModelRecord.model_fields}
    entries = verbalizer and tuple(
        VerbalizerEntry(label=label, text=text) for label, text in verbalizer.items()
    )
    described = manifest(
        method=method.name,
        num_virtual_tokens=tokens,
        template=INSIDE if method.inside else FRONT,
        verbalizer=entries,
        base_model=BaseModelRecord(**record),
    )
    return PromptArtifact(tensors, described).save(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, ServedPrompt]]:
    """Return a function that makes prompts of each method for a model family.

    The prompts have different lengths, and are loaded from their artifacts.
    """
    root = tmp_path_factory.mktemp("prompts")

    @lru_cache
    def make(family: str) -> dict[str, ServedPrompt]:
        backbone, made = backbone_of(family), {}
        for place, name in enumerate(NAMES):
            method = METHODS.get(name, METHODS["prefix"])
            verbalizer = UNEVEN if name == "prefix, longer" else VERBALIZER
            folder = save_prompt(
                root / f"{family}-{place}", backbone, method, 2 + 2 * place, verbalizer, place
            )
            made[name] = load_prompt(backbone, folder, name, 1)
        return made

    return make


def ask_together(
    backbone: Backbone,
    ask: Callable[[ServingEngine], list[Coroutine[Any, Any, list[Any]]]],
    **options: Any,
) -> tuple[list[list[Any]], list[tuple[str, int]]]:
    """Answer requests that all wait before the first is answered.

    Returns their answers and the batches that they took.
    """
    recorder = Recorder()
    engine = Blocked(backbone, observe=recorder, **options)

    async def run() -> list[list[Any]]:
        tasks = [asyncio.create_task(one) for one in ask(engine)]
        await asyncio.sleep(0)
        engine.go.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(run())
    engine.close()
    return answers, recorder.batches


def encoded(prompt: ServedPrompt, tokens: int = 8) -> list[list[int]]:
    return [prompt.encode(text, tokens) for text in TEXTS]


def batches_of(family: str, kind: str) -> list[tuple[str, int]]:
    """Return the first forwards of 4 rows of each prompt.

    All rows share one forward, except where prefixes need their own.
    """
    if family in PROMPT_ONCE_FAMILIES or family in SEQ2SEQ or family in MASKED:
        return [(kind, 20)]
    return [(kind, 12), (kind, 8)]


@every_family
def test_methods_classify_in_one_batch(family: str, served: Any) -> None:
    """Rows of prompts of all methods get together what each row gets alone, offline."""
    backbone, prompts = backbone_of(family), served(family)
    answers, batches = ask_together(
        backbone,
        lambda engine: [engine.classify(prompt, encoded(prompt)) for prompt in prompts.values()],
    )
    assert batches == batches_of(family, "classify")
    seen = set()
    for prompt, probs in zip(prompts.values(), answers, strict=True):
        offline = OfflineModel(backbone, prompt)
        for text, row in zip(TEXTS, probs, strict=True):
            (alone,) = offline.classify([text])
            assert row == pytest.approx(list(alone["probs"].values()), rel=1e-6, abs=0)
            seen.add(f"{row[1]:.4g}")
    assert len(seen) > 15  # the prompts and the rows matter


@every_family
@pytest.mark.parametrize("name", METHODS)
def test_served_labels_are_those_of_the_evaluation(
    family: str, name: str, served: Any, tmp_path: Path
) -> None:
    """The served label is the one that evaluation ranks first.

    The probabilities follow from the losses of the evaluation.
    """
    backbone, prompt = backbone_of(family), served(family)[name]
    folder = save_prompt(
        tmp_path / "p", backbone, METHODS[name], prompt.virtual_tokens, seed=NAMES.index(name)
    )
    tensors = [prompt_tensors(PromptArtifact.load(folder))]
    rows = OfflineModel(backbone, prompt).classify(TEXTS)
    for right, accuracy in ((True, 1.0), (False, 0.0)):
        labelled = [
            {"text": text, "label": int(row["label"] == right)}
            for text, row in zip(TEXTS, rows, strict=True)
        ]
        (metrics,) = evaluate(
            backbone, tensors, prompt.encoder.encode(labelled, "label"), prompt.encoder
        )
        assert metrics["accuracy"] == accuracy
    # Without a verbalizer the loss covers the given tokens: an answer without its end token.
    plain = Encoder(backbone.tokenizer, prompt.encoder.template, None, 64, 8, backbone.family)
    for text, row in zip(TEXTS, rows, strict=True):
        ids = plain.encode_input({"text": text})
        scores = []
        for answer in prompt.answers:
            (metrics,) = evaluate(backbone, tensors, Encoded([ids], [list(answer)], [-1]), plain)
            scores.append(-metrics["loss"] * len(answer))
        wanted = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
        assert list(row["probs"].values()) == pytest.approx(wanted, rel=1e-4, abs=0)


def generated(
    backbone: Backbone, prompt: ServedPrompt, vectors: torch.Tensor, ids: list[int], tokens: int
) -> str:
    """Generate one row with transformers, without padding.

    The row is [prompt; input], or has the prompt inside.
    """
    device = backbone.device
    vectors = vectors.to(device)
    if prompt.encoder.template.places_virtual_tokens:
        row = placed(ids, len(vectors))
        assert sorted(-entry - 1 for entry in row if entry < 0) == list(range(len(vectors)))
        each = [
            vectors[-entry - 1] if entry < 0 else backbone.embed(torch.tensor(entry, device=device))
            for entry in row
        ]
        embeds = torch.stack(each)[None]
    else:
        embeds = torch.cat([vectors, backbone.embed(torch.tensor(ids, device=device))])[None]
    model: Any = backbone.model
    with torch.no_grad():
        made = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            eos_token_id=prompt.encoder.end_id,
            pad_token_id=1,
            forced_eos_token_id=None,  # BART's default, which tuning does not use
        )[0].tolist()
    if backbone.family == "seq2seq":
        made = made[1:]  # without the decoder's start token
    if prompt.encoder.end_id in made:
        made = made[: made.index(prompt.encoder.end_id)]
    return str(backbone.tokenizer.decode(made, skip_special_tokens=True))


@every_generating_family
def test_methods_generate_in_one_batch(family: str, served: Any, tmp_path: Path) -> None:
    """Rows of prompts of all methods generate together what each generates alone.

    Evaluation generates the same and, for prompts with embeddings, so does transformers.
    """
    backbone, prompts = backbone_of(family), served(family)
    answers, batches = ask_together(
        backbone,
        lambda engine: [
            engine.complete(prompt, encoded(prompt), GREEDY) for prompt in prompts.values()
        ],
    )
    assert batches[0] == batches_of(family, "prefill")[0]
    seen = set()
    for place, (prompt, completions) in enumerate(zip(prompts.values(), answers, strict=True)):
        method = METHODS.get(prompt.name, METHODS["prefix"])
        folder = save_prompt(
            tmp_path / str(place), backbone, method, prompt.virtual_tokens, seed=place
        )
        tensors, offline = (
            prompt_tensors(PromptArtifact.load(folder)),
            OfflineModel(backbone, prompt),
        )
        with torch.no_grad():
            prepared = backbone.prepare([tensors])
            (texts,) = generate(
                backbone, prepared, encoded(prompt), prompt.encoder, Decoding(GREEDY.max_tokens)
            )
        assert [completion.text.strip() for completion in completions] == texts
        assert completions == offline.complete(TEXTS, GREEDY)
        if tensors.embeddings is not None:
            vectors = tensors.embeddings.to(backbone.table)
            wanted = [
                generated(backbone, prompt, vectors, ids, GREEDY.max_tokens)
                for ids in encoded(prompt)
            ]
            assert [completion.text for completion in completions] == wanted
        seen |= {completion.text for completion in completions}
    assert len(seen) > 5  # with a window of six tokens, some rows see no prompt


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_rows_that_have_to_wait_keep_their_order(family: str, served: Any) -> None:
    """Where prefixes need their own forward, alternating rows take two batches.

    They do not take a batch for each row.
    """
    backbone, prompts = backbone_of(family), served(family)
    turns = [prompts["prefix"], prompts["prompt tuning"]] * 4
    answers, batches = ask_together(
        backbone, lambda engine: [engine.classify(prompt, encoded(prompt)[:1]) for prompt in turns]
    )
    assert batches == [("classify", 4), ("classify", 4)]
    for prompt, (row,) in zip(turns, answers, strict=True):
        (alone,) = OfflineModel(backbone, prompt).classify(TEXTS[:1])
        assert row == pytest.approx(list(alone["probs"].values()), rel=1e-6, abs=0)


def test_special_tokens_of_a_decoder_are_no_text(served: Any) -> None:
    """A decoder's start token is not shown, and the text itself keeps its spaces."""
    prompt = served("t5")["prompt tuning"]
    tokenizer = prompt.encoder.tokenizer
    ids = tokenizer(" good movie .", add_special_tokens=False)["input_ids"]
    row = GenerationRow(prompt, encoded(prompt)[0], Sampling(max_tokens=99))
    for token in [tokenizer.pad_token_id, *ids, prompt.encoder.end_id]:
        row.take(token)
    assert row.completion is not None
    assert (row.completion.text, row.completion.finish_reason) == (" good movie .", "stop")
    assert row.completion.tokens == len(ids) + 2


def test_text_follows_what_stands_before_placed_virtual_tokens(served: Any) -> None:
    """A row that ends with virtual tokens is decoded behind its last real tokens."""
    prompt = served("llama")["prompt tuning inside"]
    ids = prompt.encode("the fox", 8)
    assert min(ids[-2:]) < 0
    row = GenerationRow(prompt, ids, Sampling(max_tokens=99))
    for token in [*prompt.encoder.tokenizer(" good movie")["input_ids"], prompt.encoder.end_id]:
        row.take(token)
    assert row.completion is not None and row.completion.text == " good movie"


@pytest.mark.parametrize("name", ["prompt tuning", "prompt tuning inside"])
def test_room_is_counted_in_real_and_virtual_tokens(name: str, served: Any) -> None:
    """Places for virtual tokens take no room of their own.

    An input therefore fits to the last token of the context.
    """
    prompt = served("llama")[name]
    ids = prompt.encode("win", 1)
    room = prompt.context_length - prompt.virtual_tokens - len(text_ids(ids))
    assert prompt.encode("win", room) == ids
    with pytest.raises(ContextExceeded, match=f"needs {prompt.context_length + 1}"):
        prompt.encode("win", room + 1)


# -- HTTP ------------------------------------------------------------------------------------------


@pytest.fixture
def ask_family(
    registry: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str], Client]:
    """Return a function that makes a client of a server on a family's model.

    The server has a prompt that classifies and one that was tuned on texts.
    """

    def make(family: str) -> Client:
        backbone = backbone_of(family)
        registry.aliases, registry.folders = {}, {}
        inside = METHODS["prompt tuning inside"]
        registry.add("labels", 1, save_prompt(tmp_path / "labels", backbone, inside), "champion")
        registry.add(
            "texts", 1, save_prompt(tmp_path / "texts", backbone, verbalizer=None), "champion"
        )
        store = PromptStore(backbone, registry)
        store.refresh()
        service = PromptService(store, ServingEngine(backbone))
        request.addfinalizer(service.close)
        return Client(service)

    return make


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_every_family_is_listed_and_classifies(family: str, ask_family: Any) -> None:
    """The list, health and labels are the same for every family."""
    client = ask_family(family)
    assert client.get("/health").json() == {"status": "ok"}
    assert [
        (entry["id"], entry["labels"]) for entry in client.get("/v1/models").json()["data"]
    ] == [
        ("labels", [0, 1]),
        ("texts", None),
    ]
    answer = client.post("/classify", {"model": "labels", "input": TEXTS})
    assert answer.status_code == 200, answer.text
    assert {row["label"] for row in answer.json()["data"]} <= {0, 1}
    error = error_of(client.post("/classify", {"model": "texts", "input": "a"}))
    assert (error["code"], error["param"]) == ("unsupported_operation", "model")
    assert ("use /v1/completions" in error["message"]) == (family != "bert")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_usage_counts_no_virtual_tokens(family: str, ask_family: Any) -> None:
    """prompt_tokens are those of the text, even with virtual tokens placed in it."""
    body = {"model": "labels", "prompt": "win", "max_tokens": 5, "temperature": 0}
    document = ask_family(family).post("/v1/completions", body).json()
    tokenizer = backbone_of(family).tokenizer
    words = len(tokenizer("a win ", add_special_tokens=False)["input_ids"])
    assert document["usage"]["prompt_tokens"] == words + (
        family == "t5"
    )  # plus the end token of an encoder's input
    assert document["choices"][0]["finish_reason"] in ("stop", "length")


def test_masked_models_complete_nothing(ask_family: Any) -> None:
    """The refusal has the reason, and names /classify where the prompt can classify."""
    client = ask_family("bert")
    for model, instead in (("labels", True), ("texts", False)):
        answer = client.post("/v1/completions", {"model": model, "prompt": "win"})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (
            400,
            "unsupported_operation",
            "model",
        )
        assert "masked model" in error["message"]
        assert ("use /classify" in error["message"]) == instead


# -- Offline, from folders -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_mlflows_model_answers_for_every_family(family: str, tmp_path: Path) -> None:
    """MLflow's model loads its base model by itself, and answers like a loaded one."""
    from orchestrator.registry.versions.pyfunc_model import PromptModel  # imports mlflow

    base = tmp_path / "base"
    tiny_model(family, torch.float32).save_pretrained(base)
    tokenizer_of(family).save_pretrained(base)
    backbone = load(base)
    rows = pd.DataFrame({"text": TEXTS})
    for name, verbalizer in (("labels", VERBALIZER), ("texts", None)):
        folder = save_prompt(tmp_path / name, backbone, METHODS["prefix"], verbalizer=verbalizer)
        offline, model = OfflineModel.from_artifact(folder, backbone), PromptModel()
        model.load_context(SimpleNamespace(artifacts={"prompt": str(folder)}))
        if verbalizer is not None:
            found = zip(model.predict(None, rows), offline.classify(TEXTS), strict=True)
            assert all(one == other for one, other in found)
        elif family not in MASKED:
            assert model.predict(None, rows) == [
                {"text": completion.text} for completion in offline.complete(TEXTS)
            ]
        else:
            with pytest.raises(BadInput, match="masked model"):
                model.predict(None, rows)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_prompt_loads_while_others_are_answered(family: str, tmp_path: Path) -> None:
    """A forward behind a prefix in one thread does not affect another thread.

    The other thread reads shapes off the same model to load a prompt.
    """
    backbone = backbone_of(family)
    folder = save_prompt(tmp_path / "p", backbone, METHODS["prefix"])
    answering = load_prompt(backbone, folder, "p", 1).prepared
    del backbone.prefix_shapes
    with ThreadPoolExecutor(1) as other, torch.inference_mode():
        alone = backbone.teacher_forced(answering, [[5, 6]], [[7]], [0])[0]
        rows = torch.zeros(3, dtype=torch.long, device=backbone.device)
        with backbone.prefix_of(answering, rows, list(backbone.sites)):
            loaded = other.submit(load_prompt, backbone, folder, "p", 1).result()
            logits = other.submit(
                lambda: backbone.teacher_forced(None, [[5, 6]], [[7]], [0])[0].clone()
            ).result()
        assert not torch.allclose(logits, alone)
        assert torch.equal(logits, backbone.teacher_forced(None, [[5, 6]], [[7]], [0])[0])
    assert all(
        torch.equal(one, two)
        for one, two in zip(loaded.prepared.tensors, answering.tensors, strict=True)
    )
