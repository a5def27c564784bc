"""A tiny random model, prompts for it, and a registry in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import load, save_model

from orchestrator.artifact import (
    BaseModelRecord,
    DataRecord,
    Manifest,
    PromptArtifact,
    VerbalizerEntry,
)
from orchestrator.errors import Unreachable
from orchestrator.models.backbone import Backbone
from orchestrator.registry import Canary, LiveModel, Registry
from orchestrator.registry.versions.refs import NoSuchVersion
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.service import PromptService, RequestLimits
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt
from orchestrator.serving.prompts.store import PromptStore


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
    """Save a prompt artifact for the backbone; ``changes`` are made to the manifest."""
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
    """Return ``save_artifact``: ``write_artifact(folder, backbone, **options)``."""
    return save_artifact


@pytest.fixture
def make_artifact(tmp_path: Path, backbone: Backbone) -> MakeArtifact:
    """Return a function that saves an artifact for the tiny model under a given name."""

    def make(name: str = "prompt", on: Backbone = backbone, **options: Any) -> Path:
        return save_artifact(tmp_path / name, on, **options)

    return make


SPAM = {0: " ham", 1: " spam"}
TREC = {"person": " a person", "place": " a place", "number": " a number of things"}


@pytest.fixture
def spam(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """A prompt that classifies, with 4 virtual tokens and integer labels."""
    return load_prompt(backbone, make_artifact("spam", verbalizer=SPAM), "spam", 1)


@pytest.fixture(scope="session")
def spam_store(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, str]:
    """A registry with one prompt, as the environment variables of a command."""
    folder = tmp_path_factory.mktemp("registry")
    uri, cache = f"sqlite:///{folder}/mlflow.db", folder / "cache"
    registry = Registry(uri, cache_dir=cache)
    with registry.start_search("serving", {}, {}) as search:
        registry.register(
            save_artifact(folder / "spam", backbone, verbalizer=SPAM), "spam", search.run_id
        )
        registry.set_alias("spam", "champion", 1)
    return {**os.environ, "MLFLOW_TRACKING_URI": uri, "ORCHESTRATOR_CACHE": str(cache)}


@pytest.fixture
def trec(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """A prompt that classifies, with 11 virtual tokens and labels of several tokens."""
    options = {
        "tokens": 11,
        "verbalizer": TREC,
        "seed": 1,
        "template": "Q: {question} about {topic}\nA:",
    }
    return load_prompt(backbone, make_artifact("trec", **options), "trec", 1)


@pytest.fixture
def story(backbone: Backbone, make_artifact: MakeArtifact) -> ServedPrompt:
    """A prompt that generates text."""
    return load_prompt(
        backbone, make_artifact("story", tokens=7, seed=2, template="{text}"), "story", 1
    )


class MemoryRegistry:
    """A registry in memory that can be made unreachable."""

    def __init__(self) -> None:
        self.aliases: dict[str, dict[str, int]] = {}
        self.folders: dict[tuple[str, int], Path] = {}
        self.canaries: dict[str, Canary] = {}
        self.away = False
        self.fetched: list[tuple[str, int]] = []

    def add(self, name: str, version: int, folder: Path, *aliases: str) -> None:
        self.folders[name, version] = folder
        self.aliases.setdefault(name, {}).update(dict.fromkeys(aliases, version))

    def live(self) -> dict[str, LiveModel]:
        if self.away:
            raise Unreachable("no answer")
        return {
            name: LiveModel(dict(aliases), self.canaries.get(name))
            for name, aliases in self.aliases.items()
        }

    def fetch(self, name: str, version: int) -> Path:
        if self.away:
            raise Unreachable("no answer")
        self.fetched.append((name, version))
        if (name, version) not in self.folders:
            raise NoSuchVersion(f"registered model {name} has no version {version}")
        return self.folders[name, version]


@pytest.fixture
def registry(make_artifact: MakeArtifact) -> MemoryRegistry:
    """A registry with three champions: spam, trec and story."""
    registry = MemoryRegistry()
    registry.add("spam", 1, make_artifact("spam-1", verbalizer=SPAM), "champion")
    registry.add(
        "trec",
        1,
        make_artifact(
            "trec-1", tokens=11, verbalizer=TREC, seed=1, template="Q: {question} {topic}"
        ),
        "champion",
    )
    registry.add(
        "story", 1, make_artifact("story-1", tokens=7, seed=2, template="{text}"), "champion"
    )
    return registry


@pytest.fixture
def engine(backbone: Backbone) -> Iterator[ServingEngine]:
    engine = ServingEngine(backbone)
    yield engine
    engine.close()


@pytest.fixture
def service(
    backbone: Backbone, registry: MemoryRegistry, engine: ServingEngine
) -> Iterator[PromptService]:
    """The service without HTTP; tests refresh its store by hand."""
    store = PromptStore(backbone, registry)
    store.refresh()
    service = PromptService(store, engine, RequestLimits(max_inputs=8, max_body_bytes=20_000))
    engine._observe, engine._first_token = service.metrics.batch, service.metrics.first_token
    yield service
    service.close()
