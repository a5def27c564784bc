"""A row has the same token ids in training, in evaluation and on every way to a served prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import mlflow
import pytest
from chat_models import STYLES, WITHOUT_SYSTEM, chat_backbone

from orchestrator.artifact import PromptArtifact
from orchestrator.cli.workbench.domain_shift import Loaded, Question, _encoded, _groups
from orchestrator.data.dataset import load_rows
from orchestrator.data.encoding import Encoder, make_encoder
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataFiles, DataSpec
from orchestrator.registry import Registry
from orchestrator.search.prepare import chat_record, verbalizer_entries
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import load_prompt
from orchestrator.serving.prompts.store import PromptStore

LABELS = {"no": "a quick no", "yes": "good movie"}
TEXTS = ["the fox", "lazy <|im_end|><|eot_id|> dog <end>", "[/INST] <end_of_turn> <|end|> over"]
LIMIT = 100


class RecordingEngine(ServingEngine):
    """An engine that keeps the token ids of the rows that it gets."""

    seen: list[list[int]]

    async def classify(self, prompt: Any, inputs: Sequence[list[int]]) -> Any:
        self.seen = [list(ids) for ids in inputs]
        return await super().classify(prompt, inputs)

    async def complete(self, prompt: Any, inputs: Sequence[list[int]], sampling: Any) -> Any:
        self.seen = [list(ids) for ids in inputs]
        return await super().complete(prompt, inputs, sampling)


class Paths:
    """A prompt tuned on some rows, on all its ways to be used."""

    def __init__(
        self, name: str, folder: Path, registry: Any, write_artifact: Any, rows: Any, spec: Any
    ) -> None:
        self.backbone = chat_backbone(name)
        self.file = folder / "rows.jsonl"
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole = str(self.file)
        path = DataFiles(train=whole, validation=whole, test=whole)
        self.data = DataSpec(path=path, max_input_tokens=LIMIT, **spec)
        self.splits = load_rows(self.data)
        table = len(self.backbone.table)
        self.encoder: Encoder = make_encoder(
            self.data, self.splits, self.backbone.tokenizer, "causal", table
        )
        self.encoded = self.encoder.encode(self.splits.train, self.data.target)
        self.folder = write_artifact(
            folder / "prompt", self.backbone,
            template=self.data.template, target=self.data.target, max_input_tokens=LIMIT,
            chat=chat_record(self.encoder),
        )  # fmt: skip
        if self.data.verbalizer:
            entries = verbalizer_entries(self.encoder)
            artifact = PromptArtifact.load(self.folder)
            changed = artifact.manifest.model_copy(update={"verbalizer": entries})
            self.folder = PromptArtifact(artifact.tensors, changed).save(folder / "labels")
        registry.add("chat", 7, self.folder, "champion")
        self.engine = RecordingEngine(self.backbone)
        store = PromptStore(self.backbone, registry)
        store.refresh()
        self.service = PromptService(store, self.engine)
        self.api = make_api(self.service)
        self.prompt = load_prompt(self.backbone, self.folder, "chat", 7)

    def ask(self, path: str, body: dict[str, Any]) -> list[list[int]]:
        """The ids that a request's rows have in the engine."""

        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            address = "http://localhost"
            async with httpx.AsyncClient(transport=transport, base_url=address) as client:
                return await client.post(path, json={"model": "chat", **body})

        answer = asyncio.run(post())
        assert answer.status_code == 200, answer.text
        return self.engine.seen

    def talk(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation through /v1/chat/completions."""
        body = {"messages": list(messages), "max_tokens": 1, "temperature": 0}
        (ids,) = self.ask("/v1/chat/completions", body)
        return ids

    def evaluated(self) -> list[list[int]]:
        """The ids that ``evaluate`` gives the rows."""
        artifact = PromptArtifact.load(self.folder)
        one = Loaded(SimpleNamespace(name="chat", version=7), artifact, self.prompt)  # type: ignore[arg-type]
        question = Question(str(self.file))
        return _encoded(one, _groups(artifact, question), question)[0].inputs

    def offline(self) -> list[list[int]]:
        """The ids of the model that the pyfunc model uses."""
        columns = self.encoder.template.columns
        rows = [{column: row[column] for column in columns} for row in self.splits.train]
        return OfflineModel(self.backbone, self.prompt)._encoded(rows, 1)


@pytest.fixture
def paths(tmp_path: Path, registry: Any, write_artifact: Any) -> Any:
    made: list[Paths] = []

    def make(name: str, rows: Any, **spec: Any) -> Paths:
        made.append(Paths(name, tmp_path, registry, write_artifact, rows, spec))
        return made[-1]

    yield make
    for one in made:
        one.service.close()


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("has_labels", [True, False])
def test_a_text_has_the_same_ids_on_every_path(paths: Any, name: str, has_labels: bool) -> None:
    """Texts in a chat: completions, chat, classify, the offline model, evaluate and training."""
    texts = [*TEXTS, "the quick brown fox " * 13]  # the last one is cut
    labels = ["no", "yes", "yes", "no"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    chat = True if name in WITHOUT_SYSTEM else {"system": "be brief"}
    made = paths(
        name, rows, template="{*}{text}\nSpam?", target="label", chat=chat,
        verbalizer=LABELS if has_labels else None,
    )  # fmt: skip
    expected = made.encoded.inputs
    assert len(expected[-1]) <= LIMIT < len(made.encoder.row_ids(made.splits.train[-1]))
    body = {"max_tokens": 1, "temperature": 0}
    assert made.evaluated() == made.offline() == expected
    if has_labels:
        assert made.ask("/classify", {"input": texts}) == expected
    else:
        assert made.ask("/v1/completions", {"prompt": texts, **body}) == expected
    for text, ids in zip(texts, expected, strict=True):
        assert made.talk([{"role": "user", "content": text}]) == ids


@pytest.mark.parametrize("name", STYLES)
def test_a_conversation_has_the_same_ids_on_every_path(paths: Any, name: str) -> None:
    """Conversations: chat, the offline model, evaluate and training; a single turn anywhere."""
    answer = {"role": "assistant", "content": "good"}
    system = [] if name in WITHOUT_SYSTEM else [{"role": "system", "content": "be brief"}]
    talks = [
        [{"role": "user", "content": "fox"}],
        [{"role": "user", "content": TEXTS[1]}],
        [*system, {"role": "user", "content": "fox"}],
        [{"role": "user", "content": "a"}, answer, {"role": "user", "content": TEXTS[1]}],
    ]
    made = paths(name, [{"turns": [*talk, answer]} for talk in talks], messages="turns")
    expected = made.encoded.inputs
    assert made.evaluated() == made.offline() == expected
    assert [made.talk(talk) for talk in talks] == expected
    texts = [talk[0]["content"] for talk in talks[:2]]
    body = {"prompt": texts, "max_tokens": 1, "temperature": 0}
    assert made.ask("/v1/completions", body) == expected[:2]


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_a_prompt_tuned_on_bare_text_is_served_bare(paths: Any, name: str) -> None:
    """One message passes through the prompt's own template alone, several through both."""
    rows = [{"text": text, "label": "good"} for text in TEXTS]
    made = paths(name, rows, template="{text}\nSpam?", target="label")
    expected = made.encoded.inputs
    for text, ids in zip(TEXTS, expected, strict=True):
        assert made.talk([{"role": "user", "content": text}]) == ids
    several = made.talk(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "fox"},
        ]
    )
    text = made.backbone.tokenizer.decode(several)
    assert "fox\nSpam?" in text and text.count("Spam?") == 1
    assert (STYLES[name].special[0] in text) and several not in expected


def test_a_completion_ends_with_the_turn(paths: Any) -> None:
    """The served prompt stops at the end of a turn, as in training."""
    made = paths("chatml", [{"prompt": "a", "completion": "b"}], chat=True)
    end = made.backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert made.prompt.encoder.end_id == end == made.encoded.targets[0][-1]


def test_another_chat_template_is_refused(paths: Any) -> None:
    """A prompt is not served in a chat template that it was not tuned in."""
    made = paths("chatml", [{"prompt": "a", "completion": "b"}], chat=True)
    tokenizer = made.backbone.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    try:
        with pytest.raises(BadInput, match="tuned in another chat template"):
            load_prompt(made.backbone, made.folder, "chat", 7)
    finally:
        tokenizer.chat_template = template


def test_the_pyfunc_model_takes_conversations(
    paths: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's model answers a list of messages as the served prompt does; so does its example."""
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "fox"},
    ]
    answer = {"role": "assistant", "content": "good"}
    made = paths("chatml", [{"turns": [*talk, answer]}], messages="turns")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = Registry(uri, cache_dir=tmp_path / "cache")
    with registry.start_search("chat", {}, {}) as search:
        registry.register(made.folder, "chat", search.run_id, example=made.splits.test[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model("models:/chat/1")
    expected = OfflineModel(made.backbone, made.prompt).complete([{"prompt": talk}])[0].text
    assert model.predict([{"prompt": talk}]) == [{"text": expected}]
    assert model.predict(model.input_example) == [{"text": expected}]


def test_an_early_artifact_parses_control_tokens(paths: Any, tmp_path: Path) -> None:
    """An artifact without the key was tuned with parse, and is served so."""
    made = paths("chatml", [{"text": "a", "label": "b"}], template="{text}", target="label")
    file = made.folder / "manifest.json"
    document = json.loads(file.read_text())
    del document["special_tokens_in_text"], document["chat"]
    file.write_text(json.dumps(document))
    early = load_prompt(made.backbone, made.folder, "chat", 7)
    end = made.backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in early.encode("a<|im_end|>", 1) and end not in made.prompt.encode("a<|im_end|>", 1)
