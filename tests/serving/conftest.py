"""A tiny random model, prompts for it, and a registry in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.artifact import BaseModelRecord, DataRecord, Manifest, PromptArtifact, VerbalizerEntry
from orchestrator.backbone import Backbone, load_backbone
from orchestrator.base_model import resolve_model
from orchestrator.errors import BadInput, Unreachable
from orchestrator.serving.engine import Engine
from orchestrator.serving.prompt_store import PromptStore
from orchestrator.serving.served_prompt import ServedPrompt, load_prompt
from orchestrator.serving.service import PromptService, RequestLimits
from orchestrator.spec import BaseModelSpec

CONTEXT = 160
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "is this message spam or ham?",
    "great good bad terrible movie",
    "a question about a person, a place, a number",
] * 3


def train_tokenizer(vocabulary: int = 330) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")  # type: ignore[no-untyped-call]


def save_model(folder: Path, seed: int = 0) -> Path:
    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Backbone:
    return load_backbone(resolve_model(BaseModelSpec(id=str(folder))))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def backbone(model_folder: Path) -> Backbone:
    return load(model_folder)


@pytest.fixture(scope="session")
def other_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load(save_model(tmp_path_factory.mktemp("models") / "other", seed=1))


MakeArtifact = Callable[..., Path]


def save_artifact(
    folder: Path,
    backbone: Backbone,
    tokens: int = 4,
    template: str = "{text}\nSpam?",
    verbalizer: dict[Any, str] | None = None,
    seed: int = 0,
    width: int | None = None,
    **changes: Any,
) -> Path:
    """A prompt artifact for the backbone; ``changes`` are made to the manifest."""
    info = backbone.info
    record = BaseModelRecord(**{name: getattr(info, name) for name in BaseModelRecord.model_fields})
    if width is not None:
        record = record.model_copy(update={"hidden_size": width})
    manifest = Manifest(
        method="prompt_tuning",
        num_virtual_tokens=tokens,
        config={"init": "random", "num_virtual_tokens": tokens, "learning_rate": 0.1, "seed": seed},
        template=template,
        target="label",
        verbalizer=None
        if verbalizer is None
        else tuple(VerbalizerEntry(label=label, text=text) for label, text in verbalizer.items()),
        max_input_tokens=64,
        max_target_tokens=16,
        base_model=record,
        data=DataRecord(path="test", fingerprint="0", rows={"train": 1}),
        metrics={"test": {"accuracy": 0.5}},
        baselines={},
        steps=1,
        search="test",
        trial="0",
        orchestrator_version="0",
    )
    manifest = manifest.model_copy(update=changes)
    noise = np.random.default_rng(seed).normal(size=(tokens, record.hidden_size)).astype(np.float32)
    return PromptArtifact(noise, manifest).save(folder)


@pytest.fixture(scope="session")
def write_artifact() -> MakeArtifact:
    """Writes an artifact to a folder: ``write_artifact(folder, backbone, **options)``."""
    return save_artifact


@pytest.fixture
def make_artifact(tmp_path: Path, backbone: Backbone) -> MakeArtifact:
    """Writes an artifact for the tiny model under a name of the test's choice."""

    def make(name: str = "prompt", on: Backbone = backbone, **options: Any) -> Path:
        return save_artifact(tmp_path / name, on, **options)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for the session; used as it is when somebody has started it already."""
    import ray

    owned = not ray.is_initialized()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    if owned:
        ray.shutdown()


SPAM = {0: " ham", 1: " spam"}
TREC = {"person": " a person", "place": " a place", "number": " a number of things"}


@pytest.fixture
def spam(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """4 virtual tokens, integer labels."""
    return load_prompt(backbone, make_artifact("spam", verbalizer=SPAM), "spam", 1)


@pytest.fixture
def trec(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """11 virtual tokens, labels of several tokens."""
    options = {"tokens": 11, "verbalizer": TREC, "seed": 1, "template": "Q: {question} about {topic}\nA:"}
    return load_prompt(backbone, make_artifact("trec", **options), "trec", 1)


@pytest.fixture
def story(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """A generation task."""
    return load_prompt(backbone, make_artifact("story", tokens=7, seed=2, template="{text}"), "story", 1)


class MemoryRegistry:
    """A registry in memory that can be away."""

    def __init__(self) -> None:
        self.aliases: dict[str, dict[str, int]] = {}
        self.folders: dict[tuple[str, int], Path] = {}
        self.away = False
        self.fetched: list[tuple[str, int]] = []

    def add(self, name: str, version: int, folder: Path, *aliases: str) -> None:
        self.folders[name, version] = folder
        self.aliases.setdefault(name, {}).update(dict.fromkeys(aliases, version))

    def snapshot(self) -> dict[str, dict[str, int]]:
        if self.away:
            raise Unreachable("no answer")
        return {name: dict(aliases) for name, aliases in self.aliases.items()}

    def fetch(self, name: str, version: int) -> Path:
        if self.away:
            raise Unreachable("no answer")
        self.fetched.append((name, version))
        if (name, version) not in self.folders:
            raise BadInput(f"registered model {name} has no version {version}")
        return self.folders[name, version]


@pytest.fixture
def registry(make_artifact: MakeArtifact) -> MemoryRegistry:
    """Three prompts at their champions: spam, trec, story."""
    registry = MemoryRegistry()
    registry.add("spam", 1, make_artifact("spam-1", verbalizer=SPAM), "champion")
    registry.add(
        "trec",
        1,
        make_artifact("trec-1", tokens=11, verbalizer=TREC, seed=1, template="Q: {question} {topic}"),
        "champion",
    )
    registry.add("story", 1, make_artifact("story-1", tokens=7, seed=2, template="{text}"), "champion")
    return registry


@pytest.fixture
def engine(backbone: Backbone) -> Iterator[Engine]:
    engine = Engine(backbone)
    yield engine
    engine.close()


@pytest.fixture
def service(backbone: Backbone, registry: MemoryRegistry, engine: Engine) -> Iterator[PromptService]:
    """Everything but HTTP; the store is refreshed by hand."""
    store = PromptStore(backbone, registry)
    store.refresh()
    service = PromptService(store, engine, RequestLimits(max_inputs=8, max_body_bytes=20_000))
    yield service
    service.close()
