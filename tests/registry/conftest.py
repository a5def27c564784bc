"""Stores for the registry tests: an SQLite file, and MLflow servers on SQLite and PostgreSQL.

The servers are real ones on loopback ports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow_server import Server
from postgres import Cluster, running_cluster, why_no_postgres

from orchestrator.artifact import (
    BaseModelRecord,
    DataRecord,
    Manifest,
    PromptArtifact,
    VerbalizerEntry,
)
from orchestrator.registry import Registry

MakeArtifact = Callable[..., Path]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("mlflow-server")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A PostgreSQL cluster of this test session's own."""
    if reason := why_no_postgres():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres_server(
    postgres: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mlflow-postgres")
    running = Server(folder, postgres.database("served")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow sqlite 50%')}/mlflow.db"


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.long)])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """A registry on each kind of store, with its own cache."""
    uri = (
        request.getfixturevalue("sqlite_uri")
        if request.param == "sqlite"
        else request.getfixturevalue("server").uri
    )
    return Registry(uri, cache_dir=tmp_path / "cache")


@pytest.fixture(params=["server", pytest.param("postgres_server", marks=pytest.mark.long)])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """A registry behind an MLflow server, on SQLite and on PostgreSQL."""
    return Registry(request.getfixturevalue(request.param).uri, cache_dir=tmp_path / "cache")


@pytest.fixture
def local(sqlite_uri: str, tmp_path: Path) -> Registry:
    return Registry(sqlite_uri, cache_dir=tmp_path / "cache")


_numbers = count(1)


@pytest.fixture
def name() -> str:
    """A model and search name that no other test uses.

    The stores are shared, since making their schema takes seconds.
    """
    return f"sms-spam.{next(_numbers)}"


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    def make(
        accuracy: float = 0.9,
        hidden: int = 8,
        fingerprint: str = "f" * 64,
        data: str = "d" * 64,
        **changes: Any,
    ) -> Path:
        base = BaseModelRecord(
            id="builtin:quickstart",
            revision="main",
            model_type="gpt2",
            hidden_size=hidden,
            vocab_size=100,
            context_length=128,
            fingerprint=fingerprint,
            tokenizer_digest=changes.pop("tokenizer", "t" * 64),
        )
        rows = DataRecord(path="`odd` <b>data</b>", fingerprint=data, rows={"train": 10, "test": 5})
        manifest = Manifest(
            method="prompt_tuning",
            num_virtual_tokens=5,
            config={
                "init": "sample_vocab",
                "num_virtual_tokens": 5,
                "learning_rate": 0.3,
                "seed": 0,
            },
            template="{text}\nSpam or not?",
            target="label",
            verbalizer=(
                VerbalizerEntry(label=0, text=" ham"),
                VerbalizerEntry(label=1, text=" spam"),
            ),
            max_input_tokens=32,
            max_target_tokens=4,
            base_model=base,
            data=changes.pop("record", rows),
            metrics={
                "validation": {"accuracy": 0.91},
                "test": {"accuracy": accuracy, "loss": 1 - accuracy},
            },
            baselines={"zero_shot": {"test": {"accuracy": 0.23}}},
            steps=100,
            search="sms-spam",
            trial="t1",
            orchestrator_version="0.1.0",
        )
        manifest = manifest.model_copy(update=changes)
        weights = np.random.default_rng(0).normal(size=(5, hidden)).astype(np.float32)
        return PromptArtifact(weights, manifest).save(tmp_path / f"artifact-{next(_numbers)}")

    return make


@pytest.fixture
def register(registry: Registry, name: str, make_artifact: MakeArtifact) -> Callable[..., int]:
    """Return a function that registers a new artifact under the test's name, in one run."""
    return _registering(registry, name, make_artifact)


@pytest.fixture
def serve(served: Registry, name: str, make_artifact: MakeArtifact) -> Callable[..., int]:
    """Return the function of ``register`` for a registry behind a server."""
    return _registering(served, name, make_artifact)


def _registering(registry: Registry, name: str, make_artifact: MakeArtifact) -> Callable[..., int]:
    with registry.start_search(name, {}, {}) as search:
        run_id = search.run_id

    def call(**changes: Any) -> int:
        return registry.register(make_artifact(**changes), name, run_id)

    return call
